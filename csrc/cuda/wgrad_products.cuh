// The inner products of wgrad.cuh: a stage of shared memory of gradients and halos into a thread's sums.
#pragma once

#include "cuda/conv3x3_engine.cuh"

namespace fastsr::cuda {

constexpr int kWgradSide = 32;  // outputs and inputs of a tile
constexpr int kWgradThreads = 128;
constexpr int kWgradSums = kTaps * kWgradSide * kWgradSide;
constexpr int kWgradPartial = kWgradSums + kWgradSide;  // [tap][output][input], then the bias's

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

// The sums of a warp's 16 outputs x 16 inputs x 9 taps, as mma.sync leaves them.
__device__ __forceinline__ void write_mma_sums(const float (&sums)[kTaps][2][4], float* partial) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int output = warp / 2 * 16 + lower * 8 + lane / 4;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int input = warp % 2 * 16 + half * 8 + lane % 4 * 2;
        *reinterpret_cast<Pack<float, 2>*>(partial + (tap * kWgradSide + output) * kWgradSide + input) = {sums[tap][half][lower * 2],
                                                                                                         sums[tap][half][lower * 2 + 1]};
      }
    }
  }
}

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
    write_mma_sums(sums, partial);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (!with_bias || warp % 2 != 0 || lane % 4 != 0) return;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) partial[kWgradSums + warp / 2 * 16 + lower * 8 + lane / 4] = bias[lower * 2];  // all columns are alike
  }
};

// Tensor cores, float32 rounded to tf32: as WgradMma, each element loaded by itself, since ldmatrix turns 16-bit elements only; a row's
// 16 pixels are two steps of K. The bias's gradient is the sum of what was not rounded.
struct WgradTf32 {
  using Tile = WgradTile<float>;
  float sums[kTaps][2][4] = {}, bias[2] = {};

  // Channels g and g + 8 of pixels q and q + 4: chunks of 8 channels lie `pitch` apart.
  static __device__ __forceinline__ const uint32_t* element(const unsigned char* pixels, int row, int pitch, int chunk) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    return reinterpret_cast<const uint32_t*>(pixels + chunk * pitch + row_offset(row + q, g / 4)) + g % 4;
  }

  __device__ __forceinline__ void multiply(const unsigned char* gradients, const unsigned char* halos, bool with_bias) {
    const int warp = threadIdx.x / 32;
    const unsigned char* gradient = gradients + warp / 2 * 2 * Tile::gradient_bytes;
    const unsigned char* halo = halos + warp % 2 * 2 * Tile::halo_bytes;
    uint32_t a[3][2][4] = {};  // rows of g: this one and the two above; steps of K
#pragma unroll 1
    for (int row = 0; row < Tile::rows + 2; ++row) {
#pragma unroll
      for (int i = 0; i < 8; ++i) a[2][i / 4][i % 4] = a[1][i / 4][i % 4], a[1][i / 4][i % 4] = a[0][i / 4][i % 4];
      if (row < Tile::rows) {
        float partial[2] = {};
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[0][step][i] = *element(gradient, row * kTileWidth + step * 8 + i / 2 * 4, Tile::gradient_bytes, i % 2);
            partial[i % 2] += __uint_as_float(a[0][step][i]);
          }
          round_to_tf32(a[0][step]);
        }
        if (with_bias) bias[0] += partial[0], bias[1] += partial[1];
      }
#pragma unroll
      for (int kw = 0; kw < 3; ++kw) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          uint32_t b[4];  // as load_matrices gives them: inputs 0..7 and 8..15, pixels q and q + 4 of each
#pragma unroll
          for (int i = 0; i < 4; ++i) b[i] = *element(halo, row * kHaloWidth + kw + step * 8 + i % 2 * 4, Tile::halo_bytes, i / 2);
          round_to_tf32(b);
#pragma unroll
          for (int kh = 0; kh < 3; ++kh) {
            if (row < kh || row - kh >= Tile::rows) continue;
            mma<float>(sums[kh * 3 + kw][0], a[kh][step], b[0], b[1]);
            mma<float>(sums[kh * 3 + kw][1], a[kh][step], b[2], b[3]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void write(float* partial, bool with_bias) const {
    write_mma_sums(sums, partial);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      float sum = bias[lower];
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (with_bias && warp % 2 == 0 && lane % 4 == 0) partial[kWgradSums + warp / 2 * 16 + lower * 8 + lane / 4] = sum;
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

// How a convolution's weight gradients are computed where it is computed by Products.
template <class Products, class T>
using WgradProduct = std::conditional_t<std::is_same_v<Products, FusedMultiplyAdds>, WgradFma,
                                        std::conditional_t<std::is_same_v<T, float>, WgradTf32, WgradMma<T>>>;

}  // namespace fastsr::cuda
