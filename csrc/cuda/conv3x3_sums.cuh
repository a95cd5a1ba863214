// A convolution that also sums what it writes, as the nine taps of a following 3x3 convolution will see it.
//
//     tap (kh, kw) reads all pixels but a border row and a border column:       kh = 0 misses the last row, kh = 2 the first one;
//                                                                               kw likewise, kh = 1 and kw = 1 miss none
//
//     y, as stored      shared memory [pixel][column], where the stages were      a thread: one column, every PARTSth row,
//     sums              shared memory [part][tap][column]                         nine sums in registers
//
// Each tile leaves nine sums of every channel; `add_tap_sums` adds the tiles of an image. Always in the same order.
//
// Moves      9 * Cout * 4 bytes a tile of 256 pixels (float32: 128): 7% of y in bf16 and in float32
// Limit      that of the convolution: a warp takes some 600 instructions for its 64 pixels of 32 channels, beside 576 mma and their
//            loads for a 64 -> 64 convolution. (Sums in the products' registers and shuffles take fewer inside a picture, but spill
//            on sm_100, where sums of 64 channels fill the registers.)
#pragma once

#include "cuda/conv3x3.cuh"

namespace fastsr::cuda {

// A sink (see NoSink) for tiles of Tile.
template <class T, class Tile>
struct TapSums {
  static constexpr bool collects = true;
  static constexpr int kParts = Tile::threads / Tile::columns, kValues = Tile::rows * kTileWidth * Tile::columns;
  template <class>
  static constexpr int shared_bytes = kValues * sizeof(T) + kParts * kTaps * Tile::columns * sizeof(float);
  float* partial;  // [tile][tap][cout]

  static __device__ __forceinline__ T* values() { return reinterpret_cast<T*>(dynamic_shared<std::max(Tile::shared_bytes, shared_bytes<Tile>)>()); }

  __device__ __forceinline__ void begin() const { __syncthreads(); }  // the last stage is read no more

  template <class P>
  __device__ __forceinline__ void put(const P& stored, int y, int x, int channel) const {
    const int pixel = y % Tile::rows * kTileWidth + x % kTileWidth;
    *reinterpret_cast<P*>(values() + pixel * Tile::columns + channel % Tile::columns) = stored;
  }

  __device__ __forceinline__ void finish(const TilePosition& tile, int height, int width, int cout) const {
    float* of_parts = reinterpret_cast<float*>(values() + kValues);  // [part][tap][column]
    const int column = threadIdx.x % Tile::columns, part = threadIdx.x / Tile::columns, channel = tile.column + column;
    const int rows = min(Tile::rows, height - tile.y), across = min(kTileWidth, width - tile.x);
    __syncthreads();
    float sums[3][3] = {};
#pragma unroll 1
    for (int row = channel < cout ? part : rows; row < rows; row += kParts) {
      const T* values_of_row = values() + row * kTileWidth * Tile::columns + column;
      float of_row[3] = {};
#pragma unroll 8
      for (int x = 0; x < across; ++x) {
        const float value = to_float(values_of_row[x * Tile::columns]);
        of_row[0] += tile.x + x != width - 1 ? value : 0.0f;
        of_row[1] += value;
        of_row[2] += tile.x + x != 0 ? value : 0.0f;
      }
#pragma unroll
      for (int kw = 0; kw < 3; ++kw) {
        sums[0][kw] += tile.y + row != height - 1 ? of_row[kw] : 0.0f;
        sums[1][kw] += of_row[kw];
        sums[2][kw] += tile.y + row != 0 ? of_row[kw] : 0.0f;
      }
    }
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) of_parts[(part * kTaps + tap) * Tile::columns + column] = sums[tap / 3][tap % 3];
    __syncthreads();
#pragma unroll 1
    for (int tap = part; tap < kTaps; tap += kParts) {
      if (channel >= cout) break;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kParts; ++i) sum += of_parts[(i * kTaps + tap) * Tile::columns + column];
      partial[(static_cast<int64_t>(tile.number) * kTaps + tap) * cout + channel] = sum;
    }
  }
};

constexpr int kSumRows = 8;  // of tiles, each with a warp of channels

// sums[image][channel][tap] from partial[image][tile][tap][channel].
template <int ROWS>
__global__ void __launch_bounds__(ROWS * 32) add_tap_sums(const float* partial, int64_t tiles, int channels, float* sums) {
  __shared__ float rows[ROWS][32];
  const int blocks = (channels + 31) / 32, lane = threadIdx.x % 32, row = threadIdx.x / 32;
  const int channel = static_cast<int>(blockIdx.x % blocks) * 32 + lane, tap = static_cast<int>(blockIdx.x / blocks % kTaps);
  const int64_t image = blockIdx.x / blocks / kTaps;
  float sum = 0.0f;
  if (channel < channels) {
#pragma unroll 4
    for (int64_t tile = row; tile < tiles; tile += ROWS) sum += partial[((image * tiles + tile) * kTaps + tap) * channels + channel];
  }
  rows[row][lane] = sum;
  __syncthreads();
  if (row != 0 || channel >= channels) return;
  for (int i = 1; i < ROWS; ++i) sum += rows[i][lane];
  sums[(image * channels + channel) * kTaps + tap] = sum;
}

// convolve, and sums[image][channel][tap] of what it wrote. launch and allocate as for weight_gradients.
template <class Products, class T, class Launch, class Allocate>
void convolve_and_sum(const Launch& launch, const Allocate& allocate, const Conv3x3Call<T>& call, float* sums) {
  const int64_t tiles = tiles_of_image<Products>(launch, call);
  float* partial = static_cast<float*>(allocate(call.batch * tiles * kTaps * call.cout * static_cast<int64_t>(sizeof(float))));
  convolve_into<Products>(launch, call, [&]<class Tile>() {
    if constexpr (requires { Tile::groups; }) return hopper::StripSums<T, Tile>{partial};
    else return TapSums<T, Tile>{partial};
  });
  launch(add_tap_sums<kSumRows>, call.batch * kTaps * ((call.cout + 31) / 32), kSumRows * 32, 0, partial, tiles, call.cout, sums);
}

}  // namespace fastsr::cuda
