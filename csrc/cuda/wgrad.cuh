// Weight and bias gradients of 3x3 convolutions that read prefixes of one workspace, several convolutions in one launch:
//
//     dweight[o, c, tap] = scale * sum over pixels p of g[p, o] * x[p + tap, c]        dbias[o] = scale * sum of g[p, o]
//
//   grid.x = splits of the pixels * tiles of all convolutions          a tile is 32 outputs x 32 inputs x 9 taps; tiles fastest
//
//        g (shared memory, 2 stages)    x (shared memory, 2 stages)          sums (registers)
//      +------ 16 ------+              +--------- 18 ---------+          c0       c16      c32
//    8 | 32 channels of |           10 | 32 channels of the   |       o0 +--------+--------+
//      | every pixel    |              | same pixels and halo |          | warp 0 | warp 1 |   each 16 x 16 x 9 taps
//      +----------------+              +----------------------+      o16 +--------+--------+
//                                                                        | warp 2 | warp 3 |   72 sums a thread
//      K of the product is 16 pixels of a row: ldmatrix.trans turns      +--------+--------+
//      both operands; a row of x meets the rows of g of three taps
//
// A block walks its share of the pixel tiles, then writes its sums to global memory; a second kernel adds the splits in their
// order: the result does not depend on who ran when. float32: 4 rows a tile, a thread 4 outputs x 2 inputs x 9 taps, fused
// multiply-adds; eight pixels a partial sum, since one chain over all of them loses digits.
//
// Lives in   shared: 32 bytes of channels of every pixel in a row (the engine's layout), two stages, 39 KB (float32 43 KB);
//            registers: 72 sums and the 3 rows of g in use; global: partial sums, 37 KB a tile and split
// Moves      g once per 32 inputs, x 1.4 times per 32 outputs, mostly from L2; partial sums once each way, 37 KB * tiles * splits
// Limit      2 * 9 * 32 * 32 FLOP a pixel and tile; a warp's 18 mma need 4 ldmatrix of 512 bytes: bound by mma.sync's rate
//
// A dense block of 64 features and 4 x 32 growths: 26 full tiles, 479,232 FLOP a pixel; 20 splits, 520 blocks, 19 MB of partial sums.
// predicted / measured, H100, bf16:
//   16x64x48x48     17.7 GFLOP, 0.022 ms at 798 TFLOP/s, mma.sync about 60% of that, 0.01 ms for the sums   0.06 ms / not measured yet
//   1x64x256x256    31.4 GFLOP, 0.039 ms                                                                    0.09 ms / not measured yet
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/conv3x3_engine.cuh"

namespace fastsr::cuda {

constexpr int kWgradSide = 32;  // outputs and inputs of a tile
constexpr int kWgradThreads = 128;
constexpr int kWgradSums = kTaps * kWgradSide * kWgradSide;
constexpr int kWgradPartial = kWgradSums + kWgradSide;  // [tap][output][input], then the bias's
constexpr int kWgradBlocks = 512;  // aimed at: 4 on each multiprocessor of the largest GPUs; never asked of the device, so bits repeat
constexpr int kWgradConvs = 16;    // of a launch
constexpr int kReduceThreads = 256;

// A stage of shared memory.
template <class T>
struct WgradTile {
  static constexpr int rows = 16 / sizeof(T);  // of pixels
  static constexpr int chunks = kWgradSide / kChunk<T>;
  // 32 bytes more than the pixels take: four chunks of one pixel lie in different banks.
  static constexpr int gradient_bytes = rows * kTileWidth * kRowBytes + 32;
  static constexpr int halo_bytes = (rows + 2) * kHaloWidth * kRowBytes;
  static constexpr int stage_bytes = chunks * (gradient_bytes + halo_bytes);
  static constexpr int shared_bytes = 2 * stage_bytes;
  static constexpr int blocks = sizeof(T) == 4 ? 3 : 4;  // per multiprocessor that the registers must leave room for
};

template <class T>
struct WgradConv {
  const T* gradient;     // of the convolution's output before its activation; strides as all others'
  void *dweight, *dbias; // contiguous, of T or, where Wgrad::wide, of float
  int cin, cout;
  bool vectors;          // set by weight_gradients, as is
  int first_tile;
  __host__ __device__ int across() const { return (cin + kWgradSide - 1) / kWgradSide; }
};

template <class T>
struct Wgrad {
  WgradConv<T> convs[kWgradConvs];
  int count, tiles, splits;  // splits of a group of images, whose sums are kept apart from the others'
  ImageView<const T> x;
  PixelStrides gradient_strides;
  int64_t units;  // pixel tiles of a group
  int height, width;
  bool vectors;
  float scale;
  bool wide;
  float* partials;  // [group][split][tile]

  __device__ __forceinline__ const WgradConv<T>& conv_of(int tile) const {
    int number = 0;
    while (number + 1 < count && tile >= convs[number + 1].first_tile) ++number;
    return convs[number];
  }
};

// Tensor cores: a warp owns 16 outputs x 16 inputs.
template <class T>
struct WgradMma {
  using Tile = WgradTile<T>;
  float sums[kTaps][2][4] = {}, bias[4] = {};

  __device__ __forceinline__ void multiply(const unsigned char* gradients, const unsigned char* halos, bool with_bias) {
    constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned char* gradient = gradients + warp / 2 * Tile::gradient_bytes;
    const unsigned char* halo = halos + warp % 2 * Tile::halo_bytes;
    uint32_t a[3][4] = {};  // rows of g: this one and the two above
#pragma unroll 1
    for (int row = 0; row < Tile::rows + 2; ++row) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[2][i] = a[1][i], a[1][i] = a[0][i];
      if (row < Tile::rows) {
        load_matrices<4, true>(a[0], gradient + row_offset(row * kTileWidth + lane / 16 * 8 + lane % 8, lane / 8 % 2));
        if (with_bias) mma<T>(bias, a[0], kOnes, kOnes);
      }
#pragma unroll
      for (int kw = 0; kw < 3; ++kw) {
        uint32_t b[4];
        load_matrices<4, true>(b, halo + row_offset(row * kHaloWidth + kw + lane % 16, lane / 16));
#pragma unroll
        for (int kh = 0; kh < 3; ++kh) {
          if (row < kh || row - kh >= Tile::rows) continue;
          mma<T>(sums[kh * 3 + kw][0], a[kh], b[0], b[1]);
          mma<T>(sums[kh * 3 + kw][1], a[kh], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void write(float* partial, bool with_bias) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int output = warp / 2 * 16 + lower * 8 + lane / 4;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int input = warp % 2 * 16 + half * 8 + lane % 4 * 2;
          *reinterpret_cast<Pack<float, 2>*>(partial + (tap * kWgradSide + output) * kWgradSide + input) = {
              sums[tap][half][lower * 2], sums[tap][half][lower * 2 + 1]};
        }
      }
      if (with_bias && warp % 2 == 0 && lane % 4 == 0) partial[kWgradSums + output] = bias[lower * 2];  // all columns are alike
    }
  }
};

// IEEE float32: a lane owns 4 outputs (by its number modulo 8) x 2 inputs, a warp the inputs of one chunk.
struct WgradFma {
  using Tile = WgradTile<float>;
  float sums[kTaps][4][2] = {}, bias[4] = {};

  __device__ __forceinline__ void multiply(const unsigned char* gradients, const unsigned char* halos, bool with_bias) {
    const int outputs = threadIdx.x % 8, inputs = threadIdx.x % 32 / 8;
    const unsigned char* gradient = gradients + outputs / 2 * Tile::gradient_bytes;
    const unsigned char* halo = halos + threadIdx.x / 32 * Tile::halo_bytes + inputs % 2 * 8;
#pragma unroll 1
    for (int run = 0; run < Tile::rows * 2; ++run) {  // of eight pixels
      const int row = run / 2, column = run % 2 * 8;
      Pack<float> g[8];
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        g[p] = *reinterpret_cast<const Pack<float>*>(gradient + row_offset(row * kTileWidth + column + p, outputs % 2));
      }
      if (with_bias) {
#pragma unroll
        for (int o = 0; o < 4; ++o) {
          float partial = g[0].v[o];
#pragma unroll
          for (int p = 1; p < 8; ++p) partial += g[p].v[o];
          bias[o] += partial;
        }
      }
#pragma unroll
      for (int kh = 0; kh < 3; ++kh) {
        Pack<float, 2> x[10];
#pragma unroll
        for (int p = 0; p < 10; ++p) {
          x[p] = *reinterpret_cast<const Pack<float, 2>*>(halo + row_offset((row + kh) * kHaloWidth + column + p, inputs / 2));
        }
#pragma unroll
        for (int kw = 0; kw < 3; ++kw) {
#pragma unroll
          for (int o = 0; o < 4; ++o) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float partial = g[0].v[o] * x[kw].v[c];
#pragma unroll
              for (int p = 1; p < 8; ++p) partial = fmaf(g[p].v[o], x[p + kw].v[c], partial);
              sums[kh * 3 + kw][o][c] += partial;
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void write(float* partial, bool with_bias) const {
    const int output = threadIdx.x % 8 * 4, input = threadIdx.x / 8 * 2;
#pragma unroll
    for (int o = 0; o < 4; ++o) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        *reinterpret_cast<Pack<float, 2>*>(partial + (tap * kWgradSide + output + o) * kWgradSide + input) = {sums[tap][o][0],
                                                                                                           sums[tap][o][1]};
      }
      if (with_bias && input == 0) partial[kWgradSums + output + o] = bias[o];
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kWgradThreads, WgradTile<T>::blocks) wgrad_kernel(const __grid_constant__ Wgrad<T> all) {
  using Tile = WgradTile<T>;
  const int tile = static_cast<int>(blockIdx.x % all.tiles), split = static_cast<int>(blockIdx.x / all.tiles);
  const WgradConv<T>& conv = all.conv_of(tile);
  const int within = tile - conv.first_tile;
  const int first_output = within / conv.across() * kWgradSide, first_input = within % conv.across() * kWgradSide;
  const ConvInput<T> x{all.x, conv.cin, all.height, all.width, 0, all.vectors};
  const ConvInput<T> gradient{{conv.gradient, all.gradient_strides}, conv.cout, all.height, all.width, 0, conv.vectors};
  const unsigned across = (all.width + kTileWidth - 1) / kTileWidth, down = (all.height + Tile::rows - 1) / Tile::rows;
  // Splits are counted through all groups: those of group n begin at its first unit, n * units.
  const int64_t begin = all.units * split / all.splits, end = all.units * (split + 1) / all.splits;

  unsigned char* shared = dynamic_shared<Tile::shared_bytes>();
  auto load = [&](int64_t unit) {
    const int64_t image = unit / (static_cast<int64_t>(across) * down);
    const unsigned place = static_cast<unsigned>(unit - image * across * down);
    const int top = static_cast<int>(place / across) * Tile::rows, left = static_cast<int>(place % across) * kTileWidth;
    unsigned char* stage = shared + (unit - begin) % 2 * Tile::stage_bytes;
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::chunks; ++chunk) {
      load_pixels<Tile::rows, kTileWidth, kWgradThreads>(stage + chunk * Tile::gradient_bytes, gradient, image, top, left,
                                                         first_output / kChunk<T> + chunk);
      load_pixels<Tile::rows + 2, kHaloWidth, kWgradThreads>(stage + Tile::chunks * Tile::gradient_bytes + chunk * Tile::halo_bytes, x,
                                                             image, top - 1, left - 1, first_input / kChunk<T> + chunk);
    }
    commit_copies();
  };
  const bool with_bias = first_input == 0;
  std::conditional_t<std::is_same_v<T, float>, WgradFma, WgradMma<T>> product;
  load(begin);  // there are no more splits than units
  for (int64_t unit = begin; unit < end; ++unit) {
    wait_copies<0>();
    __syncthreads();  // this unit is there for every thread, and the other stage is read no more
    if (unit + 1 < end) load(unit + 1);
    const unsigned char* stage = shared + (unit - begin) % 2 * Tile::stage_bytes;
    product.multiply(stage, stage + Tile::chunks * Tile::gradient_bytes, with_bias);
  }
  product.write(all.partials + static_cast<int64_t>(blockIdx.x) * kWgradPartial, with_bias);
}

// Adds the splits of the only group in their order, a thread per partial sum.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) wgrad_reduce(const __grid_constant__ Wgrad<T> all) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  const int64_t per_split = static_cast<int64_t>(all.tiles) * kWgradPartial;
  if (index >= per_split) return;
  const int tile = static_cast<int>(index / kWgradPartial), place = static_cast<int>(index % kWgradPartial);
  const WgradConv<T>& conv = all.conv_of(tile);
  const int within = tile - conv.first_tile, first_input = within % conv.across() * kWgradSide;
  const bool is_bias = place >= kWgradSums;
  const int tap = place / (kWgradSide * kWgradSide), input = first_input + place % kWgradSide;
  const int output = within / conv.across() * kWgradSide + place / (is_bias ? 1 : kWgradSide) % kWgradSide;
  if (output >= conv.cout || (is_bias ? first_input != 0 : input >= conv.cin)) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int split = 0; split < all.splits; ++split) sum += all.partials[split * per_split + index];
  void* target = is_bias ? conv.dbias : conv.dweight;
  const int64_t element = is_bias ? output : (static_cast<int64_t>(output) * conv.cin + input) * kTaps + tap;
  if (all.wide) static_cast<float*>(target)[element] = sum * all.scale;
  else static_cast<T*>(target)[element] = from_float<T>(sum * all.scale);
}

// The partial sums of at most kWgradConvs convolutions, of every group of batch / groups images apart. launch as everywhere;
// allocate(bytes) gives scratch memory that lives until the kernels have run.
template <class T, class Launch, class Allocate>
Wgrad<T> partial_weight_gradients(const Launch& launch, const Allocate& allocate, ImageView<const T> x, PixelStrides gradient_strides,
                                  int64_t batch, int64_t groups, int height, int width, const WgradConv<T>* convs, int count) {
  using Tile = WgradTile<T>;
  Wgrad<T> some{};
  some.count = count;
  for (int i = 0; i < count; ++i) {
    WgradConv<T>& conv = some.convs[i] = convs[i];
    conv.first_tile = some.tiles;
    conv.vectors = ImageView<const T>{conv.gradient, gradient_strides}.starts_at_16_bytes();
    some.tiles += conv.across() * ((conv.cout + kWgradSide - 1) / kWgradSide);
  }
  some.x = x, some.gradient_strides = gradient_strides;
  some.height = height, some.width = width, some.vectors = x.starts_at_16_bytes(), some.scale = 1.0f;
  some.units = batch / groups * ((height + Tile::rows - 1) / Tile::rows) * ((width + kTileWidth - 1) / kTileWidth);
  const int64_t apart = some.tiles * groups;
  some.splits = static_cast<int>(std::min<int64_t>(some.units, (kWgradBlocks + apart - 1) / apart));
  some.partials = static_cast<float*>(allocate(apart * some.splits * kWgradPartial * static_cast<int64_t>(sizeof(float))));
  launch(wgrad_kernel<T>, apart * some.splits, kWgradThreads, Tile::shared_bytes, some);
  return some;
}

// The gradients of all `convs`; wide: in float32.
template <class T, class Launch, class Allocate>
void weight_gradients(const Launch& launch, const Allocate& allocate, ImageView<const T> x, PixelStrides gradient_strides, int64_t batch,
                      int height, int width, float scale, const std::vector<WgradConv<T>>& convs, bool wide = false) {
  for (size_t first = 0; first < convs.size(); first += kWgradConvs) {
    const int count = static_cast<int>(std::min<size_t>(kWgradConvs, convs.size() - first));
    Wgrad<T> some = partial_weight_gradients(launch, allocate, x, gradient_strides, batch, 1, height, width, &convs[first], count);
    some.scale = scale, some.wide = wide;
    const int64_t sums = static_cast<int64_t>(some.tiles) * kWgradPartial;
    launch(wgrad_reduce<T>, (sums + kReduceThreads - 1) / kReduceThreads, kReduceThreads, 0, some);
  }
}

}  // namespace fastsr::cuda
