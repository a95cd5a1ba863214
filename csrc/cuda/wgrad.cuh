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
// order: the result does not depend on who ran when. float32: 4 rows a tile; by tensor cores (tf32) two steps of K a row, loaded an
// element at a time; else a thread 4 outputs x 2 inputs x 9 taps, fused multiply-adds, eight pixels a partial sum, since one chain over
// all of them loses digits.
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

#include "cuda/wgrad_products.cuh"

namespace fastsr::cuda {

constexpr int kWgradBlocks = 512;  // aimed at: 4 on each multiprocessor of the largest GPUs; never asked of the device, so bits repeat
constexpr int kWgradConvs = 16;    // of a launch
constexpr int kReduceThreads = 256;

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

template <class Products, class T>
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
  WgradProduct<Products, T> product;
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
template <class Products, class T, class Launch, class Allocate>
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
  launch(wgrad_kernel<Products, T>, apart * some.splits, kWgradThreads, Tile::shared_bytes, some);
  return some;
}

// The gradients of all `convs`; wide: in float32.
template <class Products, class T, class Launch, class Allocate>
void weight_gradients(const Launch& launch, const Allocate& allocate, ImageView<const T> x, PixelStrides gradient_strides, int64_t batch,
                      int height, int width, float scale, const std::vector<WgradConv<T>>& convs, bool wide = false) {
  for (size_t first = 0; first < convs.size(); first += kWgradConvs) {
    const int count = static_cast<int>(std::min<size_t>(kWgradConvs, convs.size() - first));
    Wgrad<T> some = partial_weight_gradients<Products, T>(launch, allocate, x, gradient_strides, batch, 1, height, width, &convs[first], count);
    some.scale = scale, some.wide = wide;
    const int64_t sums = static_cast<int64_t>(some.tiles) * kWgradPartial;
    launch(wgrad_reduce<T>, (sums + kReduceThreads - 1) / kReduceThreads, kReduceThreads, 0, some);
  }
}

}  // namespace fastsr::cuda
