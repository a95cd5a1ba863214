// The fused 3x3 convolution: bias, activation, PixelShuffle, scale and residual in the epilogue; x read as a channel prefix,
// optionally enlarged by nearest neighbour; y written as a channel slice. Channels-last.
//
//   grid.x = images * ceil(H/ROWS) * ceil(W/16) * (packed columns / COLUMNS)        columns fastest
//
//        x (shared memory, 2 stages)          y (registers until the epilogue)
//      +--------- 18 ---------+
//      | . . . . halo . . . . |               +------- 16 -------+
//      | .  +---- 16 ----+  . |               | warp 0: 2 rows   |   bf16/f16, 64 columns: 8 warps x 2 rows
//      | .  |            |  . |   9 taps      | warp 1           |             32, 16:      4 warps x 4 rows
//   18 | .  |  the tile  |  . |  -------->    |  ...             |   a warp: mma.sync m16n8k16, 16 pixels x 8 columns
//      | .  |            |  . |               | warp 7           |   float32: 8 rows, 4 warps, a thread 8 pixels x 1/8 of
//      | .  +------------+  . |               +------------------+            the columns, fused multiply-adds
//      | . . . . . . . . . . .|
//      +----------------------+
//
// Lives in   shared: 32 bytes of channels of every halo pixel and of every (tap, column), two stages (cp.async: zeros outside
//            the image); registers: 64 sums a thread, started with the bias; global: x once per column block, y and residual once
// Moves      (Cin + Cout (+ Cout with a residual)) * sizeof(T) bytes a pixel, 27% more of x for halos (float32 41%), weights from L2
//            once per tile (Cin * 9 * COLUMNS * sizeof(T) for 256 pixels);   18 * Cin * Cout FLOP a pixel
// Limit      bf16 64 -> 64: 288 FLOP a byte, at the balance point of an H100 (798 TFLOP/s, 3.0 TB/s: 266); a warp's ldmatrix
//            reads 8 KB for 48 mma, 64 cycles of shared memory against 96 of an A100's tensor core: bound by mma.sync's rate.
//            float32: bound by fused multiply-adds (16 16-byte loads for 256 of them and 32 plain adds)
//
// predicted / measured, 1x64x256x256 -> 64, forward (4.83 GFLOP):
//   bf16     A100 0.035 ms (256 tiles on 216 places) / not measured yet      H100 0.012 ms / not measured yet
//   float32  A100 0.33 ms / not measured yet       H100 0.10 ms / not measured yet
#pragma once

#include "cuda/conv3x3_engine.cuh"

namespace fastsr::cuda {

// One call of fastsr::conv3x3 on device pointers; strides in elements.
template <class T>
struct Conv3x3Call {
  const T *x, *weight, *bias, *residual;  // bias and residual may be null
  T* out;
  PixelStrides x_strides, residual_strides, out_strides;
  WeightStrides weight_strides;
  int64_t bias_stride;
  int64_t batch;
  int cin, cout;      // cout counts channels before PixelShuffle
  int height, width;  // of the convolution's output before PixelShuffle
  int upsample, pixel_shuffle;
  float negative_slope, scale;
};

// Steps 3 to 5 of the operator, from sums to y.
template <class T>
struct Conv3x3Epilogue {
  const T* residual;
  T* out;
  PixelStrides residual_strides, out_strides;
  int cout, pixel_shuffle;
  float negative_slope, scale;
  bool vectors;  // 16-byte runs of channels lie in one pixel of y and start at multiples of 16 bytes

  __device__ __forceinline__ float activate(float v) const {
    if (negative_slope == 0.0f) return v <= 0.0f ? 0.0f : v;  // this way round, NaN stays
    return v > 0.0f ? v : v * negative_slope;
  }

  template <int RUN>
  __device__ __forceinline__ void operator()(const float (&sums)[RUN], int64_t image, int y, int x, int channel) const {
    constexpr int kPack = RUN * sizeof(T) < 16 ? RUN : 16 / sizeof(T);
#pragma unroll
    for (int first = 0; first < RUN; first += kPack) {
      if (vectors && channel + first + kPack <= cout) {
        store<kPack>(sums + first, image, y, x, channel + first);
      } else {
        // A rolled loop that picks its value: unrolled, this rare path would be most of the kernel's code.
        const int count = min(kPack, cout - channel - first);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          float sum = sums[first];
#pragma unroll
          for (int other = 1; other < kPack; ++other) sum = i == other ? sums[first + other] : sum;
          store<1>(&sum, image, y, x, channel + first + i);
        }
      }
    }
  }

  // COUNT channels that lie side by side in one pixel of y.
  template <int COUNT>
  __device__ __forceinline__ void store(const float* sums, int64_t image, int y, int x, int channel) const {
    if (pixel_shuffle != 1) {
      const int per_pixel = cout / (pixel_shuffle * pixel_shuffle), sub = channel / per_pixel;
      y = y * pixel_shuffle + sub / pixel_shuffle, x = x * pixel_shuffle + sub % pixel_shuffle;
      channel -= sub * per_pixel;
    }
    Pack<T, COUNT> skip, result;
    if (residual) skip = *reinterpret_cast<const Pack<T, COUNT>*>(residual + residual_strides.at(image, y, x) + channel);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      float v = activate(sums[i]) * scale;
      if (residual) v += to_float(skip.v[i]);
      result.v[i] = from_float<T>(v);
    }
    *reinterpret_cast<Pack<T, COUNT>*>(out + out_strides.at(image, y, x) + channel) = result;
  }
};

template <class T>
struct ConvBias {
  const T* data;  // may be null
  int64_t stride;
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    conv3x3_kernel(ConvInput<T> input, ConvWeights<T> weights, ConvBias<T> bias, Conv3x3Epilogue<T> epilogue) {
  const TilePosition tile = tile_position<Tile>(input.height, input.width, weights.columns);
  ConvProduct<T, Tile> product;
  product.for_each_run([&](int, int, int first, auto& sums) {
#pragma unroll
    for (int i = 0; i < Tile::run; ++i) {
      const int channel = tile.column + first + i;
      const bool present = bias.data != nullptr && channel < epilogue.cout;
      sums[i] = present ? to_float(bias.data[shuffled_source(channel, epilogue.cout, epilogue.pixel_shuffle) * bias.stride]) : 0.0f;
    }
  });
  for_each_chunk<Tile>(input, weights, tile,
                       [&](const unsigned char* halo, const unsigned char* taps) { product.multiply(halo, taps); });
  product.for_each_run([&](int row, int column, int first, const auto& sums) {
    if (tile.y + row < input.height && tile.x + column < input.width) {
      epilogue(sums, tile.image, tile.y + row, tile.x + column, tile.column + first);
    }
  });
}

// Columns of a tile: few for the last layers (3 channels), else whatever of 64 and 32 pads less; wider reuses the halo more.
inline int conv3x3_tile_columns(int cout) {
  if (cout <= 16) return 16;
  return (cout + 63) / 64 * 64 > (cout + 31) / 32 * 32 ? 32 : 64;
}

// Elements of the buffer for packed weights.
template <class T>
int64_t conv3x3_packed_size(int64_t cin, int64_t cout) {
  const int64_t tile = conv3x3_tile_columns(static_cast<int>(cout));
  return (cin + kChunk<T> - 1) / kChunk<T> * kTaps * ((cout + tile - 1) / tile * tile) * kChunk<T>;
}

template <class T>
bool starts_at_16_bytes(const T* data, const PixelStrides& strides) {
  constexpr int64_t kUnit = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.n % kUnit == 0 && strides.h % kUnit == 0 && strides.w % kUnit == 0;
}

// Packs the weights into `packed` and convolves. launch(kernel, blocks, threads, shared bytes, arguments...) starts a kernel.
template <class T, class Tile, class Launch>
void conv3x3_with(const Launch& launch, const Conv3x3Call<T>& call, T* packed) {
  const int columns = (call.cout + Tile::columns - 1) / Tile::columns * Tile::columns;
  const int64_t size = conv3x3_packed_size<T>(call.cin, call.cout);
  const int r = call.pixel_shuffle;
  launch(pack_conv_weights<T>, call.batch == 0 ? 0 : (size + 255) / 256, 256, 0, call.weight, call.weight_strides, packed, call.cin,
         call.cout, columns, Tile::group, Tile::pair, r);
  const int64_t tiles = call.batch * ((call.height + Tile::rows - 1) / Tile::rows) * ((call.width + kTileWidth - 1) / kTileWidth);
  const bool whole_runs = r == 1 || call.cout / (r * r) % (16 / static_cast<int>(sizeof(T))) == 0;
  const bool vectors = whole_runs && starts_at_16_bytes(call.out, call.out_strides) &&
                       (!call.residual || starts_at_16_bytes(call.residual, call.residual_strides));
  launch(conv3x3_kernel<T, Tile>, tiles * (columns / Tile::columns), Tile::threads, Tile::shared_bytes,
         ConvInput<T>{call.x, call.x_strides, call.cin, call.height, call.width, call.upsample - 1,
                      starts_at_16_bytes(call.x, call.x_strides)},
         ConvWeights<T>{packed, columns}, ConvBias<T>{call.bias, call.bias_stride},
         Conv3x3Epilogue<T>{call.residual, call.out, call.residual_strides, call.out_strides, call.cout, r, call.negative_slope,
                            call.scale, vectors});
}

// bf16 and f16 on tensor cores.
template <class T, class Launch>
void conv3x3_mma(const Launch& launch, const Conv3x3Call<T>& call, T* packed) {
  using Wide = ConvTile<16, 64, 256, 2, 2>;
  using Narrow = ConvTile<16, 32, 128, 4, 2>;
  using Few = ConvTile<16, 16, 128, 4, 2>;
  switch (conv3x3_tile_columns(call.cout)) {
    case 64: return conv3x3_with<T, Wide>(launch, call, packed);
    case 32: return conv3x3_with<T, Narrow>(launch, call, packed);
    default: return conv3x3_with<T, Few>(launch, call, packed);
  }
}

// float32 with IEEE products.
template <class Launch>
void conv3x3_fma(const Launch& launch, const Conv3x3Call<float>& call, float* packed) {
  using Wide = ConvTile<8, 64, 128, 3, 1>;
  using Narrow = ConvTile<8, 32, 128, 4, 1>;
  using Few = ConvTile<8, 16, 128, 4, 1>;
  switch (conv3x3_tile_columns(call.cout)) {
    case 64: return conv3x3_with<float, Wide>(launch, call, packed);
    case 32: return conv3x3_with<float, Narrow>(launch, call, packed);
    default: return conv3x3_with<float, Few>(launch, call, packed);
  }
}

}  // namespace fastsr::cuda
