// The direct-halo 3x3 convolution that every 3x3 kernel of the package is built on: tiles, staging, the two inner products.
//
// Both inner products read the same stage of shared memory: 32 bytes of channels (a "chunk": 16 of bf16/f16, 8 of float32)
// of every halo pixel, then the same 32 bytes of every (tap, output column):
//
//     halo      (ROWS + 2) x 18 pixels x 32 bytes      one row = one pixel
//     weights   9 taps x COLUMNS      x 32 bytes       one row = one output column of one tap
//
// The halves of a row are swapped in every second group of four rows, so that any 8 rows whose numbers differ modulo 8
// (8 neighbouring pixels at any tap, 8 neighbouring columns) fill the 32 banks once. A tap is a shifted row number.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/copy.cuh"
#include "cuda/mma.cuh"
#include "cuda/numeric.cuh"

namespace fastsr::cuda {

constexpr int kTileWidth = 16;               // output pixels of a tile along w: the M of one mma
constexpr int kHaloWidth = kTileWidth + 2;
constexpr int kTaps = 9;
constexpr int kRowBytes = 32;

template <class T>
constexpr int kChunk = kRowBytes / sizeof(T);  // input channels of a stage

// What a block owns: ROWS x 16 pixels x COLUMNS output columns. A thread holds PAIR neighbouring columns of each group of 8.
template <int ROWS_, int COLUMNS_, int THREADS_, int BLOCKS_, int PAIR_>
struct ConvTile {
  static constexpr int rows = ROWS_, width = kTileWidth, columns = COLUMNS_, threads = THREADS_;
  static constexpr int blocks = BLOCKS_;  // blocks per multiprocessor that the registers must leave room for
  static constexpr int pair = PAIR_;
  static constexpr int group = pair == 2 && columns > 32 ? 32 : columns;  // columns that are permuted among themselves
  static constexpr int run = group / 8 * pair;                           // channels that a thread holds side by side
  static constexpr int halo_pixels = (rows + 2) * kHaloWidth;
  static constexpr int halo_bytes = halo_pixels * kRowBytes;
  static constexpr int stage_bytes = halo_bytes + kTaps * columns * kRowBytes;
  static constexpr int shared_bytes = 2 * stage_bytes;
  static_assert(halo_bytes % 128 == 0, "the weights' rows start at bank 0");
};

// The channel that a packed column stands for. A thread's columns lie 8 apart in the packed order and become neighbours here:
// its results are 16-byte runs of channels, with no exchange between lanes.
__host__ __device__ inline int channel_of_column(int column, int group, int pair) {
  const int within = column % group, tile = within / 8, owner = within % 8 / pair;
  return column - within + (owner * (group / 8) + tile) * pair + within % pair;
}

// PixelShuffle's channel o r^2 + i r + j as seen by the kernels, which order channels by sub-pixel first: (i r + j) (cout / r^2) + o.
__host__ __device__ inline int shuffled_source(int channel, int cout, int r) {
  const int per_pixel = cout / (r * r);
  return r == 1 ? channel : channel % per_pixel * r * r + channel / per_pixel;
}

// Where the pixels of an image batch lie, in elements; a pixel's channels lie side by side.
struct PixelStrides {
  int64_t n, h, w;
  __host__ __device__ int64_t at(int64_t image, int64_t y, int64_t x) const { return image * n + y * h + x * w; }
};

template <class T>
struct ImageView {
  T* data;  // null for none
  PixelStrides strides;
  __host__ __device__ T* at(int64_t image, int64_t y, int64_t x) const { return data + strides.at(image, y, x); }
  bool starts_at_16_bytes() const {
    constexpr int64_t kUnit = 16 / sizeof(T);
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.n % kUnit == 0 && strides.h % kUnit == 0 && strides.w % kUnit == 0;
  }
};

// v -> factor * factors[image][channel] * v + shifts[image][channel].
struct ChannelScaling {
  float factor;
  const float *factors, *shifts;  // null for ones and for zeros; both null for nothing to do
  __device__ __forceinline__ float operator()(float v, int64_t vector) const {
    return fmaf(v, factors ? factor * factors[vector] : factor, shifts ? shifts[vector] : 0.0f);
  }
};

template <class T>
struct ConvInput {
  ImageView<const T> image;
  int channels;       // of the prefix that is read
  int height, width;  // of the convolution: twice those of the data where it reads them enlarged
  int halvings;       // 1 where it does, else 0
  bool vectors;       // every pixel's channels start at a multiple of 16 bytes
  ChannelScaling scaling = {};  // of what is read, rounded; what lies outside the image stays zero
};

// Packed weights: [chunk][tap][column][kChunk], zero where channel or column does not exist.
template <class T>
struct ConvWeights {
  const T* packed;
  int columns;  // padded to the tile's
};

struct TilePosition {
  int64_t image;
  int y, x, column;
  unsigned number;  // of the tile of pixels, through all images
};

// Column blocks of one tile are neighbours in the grid: they share its halo in L2.
template <class Tile>
__device__ __forceinline__ TilePosition tile_position(unsigned block, int height, int width, int columns) {
  const unsigned column_blocks = columns / Tile::columns;
  const unsigned across = (width + Tile::width - 1) / Tile::width, down = (height + Tile::rows - 1) / Tile::rows;
  const unsigned tile = block / column_blocks;
  return {tile / (across * down), static_cast<int>(tile / across % down) * Tile::rows, static_cast<int>(tile % across) * Tile::width,
          static_cast<int>(block % column_blocks) * Tile::columns, tile};
}

// Tiles of one image.
template <class Tile>
int64_t tiles_of(int height, int width) {
  return static_cast<int64_t>((height + Tile::rows - 1) / Tile::rows) * ((width + Tile::width - 1) / Tile::width);
}

// Byte offset of 16-byte half 0 or 1 of a stage's row.
__device__ __forceinline__ int row_offset(int row, int half) { return row * kRowBytes + ((half ^ (row >> 2 & 1)) * 16); }

// Starts the copies of one chunk of a rectangle of pixels with its corner at (top, left), one row of shared memory per pixel;
// what lies outside the image or behind the last channel becomes zero.
template <int HEIGHT, int WIDTH, int THREADS, class T>
__device__ __forceinline__ void load_pixels(unsigned char* rows, const ConvInput<T>& input, int64_t image, int top, int left, int chunk) {
  constexpr int kUnit = 16 / sizeof(T);
#pragma unroll 1
  for (int unit = threadIdx.x; unit < HEIGHT * WIDTH * 2; unit += THREADS) {
    const int pixel = unit / 2, half = unit % 2;
    const int y = top + pixel / WIDTH, x = left + pixel % WIDTH;
    const int channel = chunk * kChunk<T> + half * kUnit;
    const bool inside = y >= 0 && y < input.height && x >= 0 && x < input.width && channel < input.channels;
    const T* source = inside ? input.image.at(image, y >> input.halvings, x >> input.halvings) + channel : input.image.data;
    const int valid = !inside ? 0 : min(kUnit, input.channels - channel);
    unsigned char* target = rows + row_offset(pixel, half);
    if (input.vectors) {
      copy_async_16(target, source, valid * static_cast<int>(sizeof(T)));
    } else {
      Pack<T> values;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) values.v[i] = i < valid ? source[i] : from_float<T>(0.0f);
      *reinterpret_cast<Pack<T>*>(target) = values;
    }
  }
}

// Scales what this thread has copied by load_pixels of the same arguments, once it is there.
template <int HEIGHT, int WIDTH, int THREADS, class T>
__device__ __forceinline__ void scale_pixels(unsigned char* rows, const ConvInput<T>& input, int64_t image, int top, int left, int chunk) {
  constexpr int kUnit = 16 / sizeof(T);
#pragma unroll 1
  for (int unit = threadIdx.x; unit < HEIGHT * WIDTH * 2; unit += THREADS) {
    const int pixel = unit / 2, half = unit % 2;
    const int y = top + pixel / WIDTH, x = left + pixel % WIDTH;
    const int channel = chunk * kChunk<T> + half * kUnit;
    if (y < 0 || y >= input.height || x < 0 || x >= input.width) continue;
    auto* values = reinterpret_cast<T*>(rows + row_offset(pixel, half));
#pragma unroll 1
    for (int i = 0; i < min(kUnit, input.channels - channel); ++i) {
      values[i] = from_float<T>(input.scaling(to_float(values[i]), image * input.channels + channel + i));
    }
  }
}

template <class Tile, class T>
__device__ __forceinline__ void load_weights(unsigned char* stage, const ConvWeights<T>& weights, int first_column, int chunk) {
  const char* source = reinterpret_cast<const char*>(weights.packed) +
                       (static_cast<int64_t>(chunk) * kTaps * weights.columns + first_column) * kRowBytes;
#pragma unroll 1
  for (int unit = threadIdx.x; unit < kTaps * Tile::columns * 2; unit += Tile::threads) {
    const int row = unit / 2, half = unit % 2, tap = row / Tile::columns;
    const char* from = source + (static_cast<int64_t>(tap) * weights.columns + row % Tile::columns) * kRowBytes + half * 16;
    copy_async_16(stage + row_offset(row, half), from, 16);
  }
}

// Runs multiply(halo, weights) over all chunks, the next chunk's copies in flight meanwhile. BYTES of shared memory hold the stages.
template <class Tile, int BYTES, class T, class Multiply>
__device__ __forceinline__ void for_each_chunk(const ConvInput<T>& input, const ConvWeights<T>& weights, const TilePosition& tile,
                                               Multiply multiply) {
  unsigned char* shared = dynamic_shared<BYTES>();
  const int chunks = (input.channels + kChunk<T> - 1) / kChunk<T>;
  auto load = [&](int chunk) {
    unsigned char* stage = shared + chunk % 2 * Tile::stage_bytes;
    load_pixels<Tile::rows + 2, kHaloWidth, Tile::threads>(stage, input, tile.image, tile.y - 1, tile.x - 1, chunk);
    load_weights<Tile>(stage + Tile::halo_bytes, weights, tile.column, chunk);
    commit_copies();
  };
  load(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_copies<0>();
    if (input.scaling.factors || input.scaling.shifts) {
      unsigned char* stage = shared + chunk % 2 * Tile::stage_bytes;
      scale_pixels<Tile::rows + 2, kHaloWidth, Tile::threads>(stage, input, tile.image, tile.y - 1, tile.x - 1, chunk);
    }
    // One barrier per chunk: this chunk is there for every thread, and the other stage is read no more.
    __syncthreads();
    if (chunk + 1 < chunks) load(chunk + 1);
    const unsigned char* stage = shared + chunk % 2 * Tile::stage_bytes;
    multiply(stage, stage + Tile::halo_bytes);
  }
}

// Tensor cores: a warp owns WARP_ROWS rows of 16 pixels and all columns of the tile.
template <class T, class Tile>
struct MmaProduct {
  static constexpr int warp_rows = Tile::rows / (Tile::threads / 32);
  static constexpr int column_tiles = Tile::columns / 8;
  static_assert(warp_rows * (Tile::threads / 32) == Tile::rows && Tile::pair == 2);
  float sums[warp_rows][column_tiles][4];

  __device__ __forceinline__ void multiply(const unsigned char* halo, const unsigned char* weights) {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * warp_rows;
#pragma unroll 1  // unrolled, the addresses of all taps are live at once and spill
    for (int kw = 0; kw < 3; ++kw) {
      // Loaded once per kw: the rows of tap (kh + 1, kw) are those of tap (kh, kw) one row further down.
      uint32_t a[warp_rows + 2][4];
#pragma unroll
      for (int row = 0; row < warp_rows + 2; ++row) {
        load_matrices(a[row], halo + row_offset((first_row + row) * kHaloWidth + kw + lane % 16, lane / 16));
        if constexpr (std::is_same_v<T, float>) round_to_tf32(a[row]);
      }
#pragma unroll
      for (int kh = 0; kh < 3; ++kh) {
#pragma unroll
        for (int columns = 0; columns < Tile::columns; columns += 16) {
          uint32_t b[4];
          const int column = columns + lane / 16 * 8 + lane % 8;
          load_matrices(b, weights + row_offset((kh * 3 + kw) * Tile::columns + column, lane / 8 % 2));
          if constexpr (std::is_same_v<T, float>) round_to_tf32(b);
#pragma unroll
          for (int row = 0; row < warp_rows; ++row) {
            mma<T>(sums[row][columns / 8], a[row + kh], b[0], b[1]);
            mma<T>(sums[row][columns / 8 + 1], a[row + kh], b[2], b[3]);
          }
        }
      }
    }
  }

  // Calls visit(row, x, first channel, run of sums) for each of the thread's pixels of the tile; the sums may be changed.
  template <class Visit>
  __device__ __forceinline__ void for_each_run(Visit visit) {
    constexpr int kTiles = Tile::group / 8;
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * warp_rows;
#pragma unroll
    for (int first = 0; first < Tile::columns; first += Tile::group) {
#pragma unroll
      for (int row = 0; row < warp_rows; ++row) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          float values[Tile::run];
#pragma unroll
          for (int i = 0; i < Tile::run; ++i) values[i] = sums[row][first / 8 + i / 2][lower * 2 + i % 2];
          visit(first_row + row, lane / 4 + lower * 8, first + lane % 4 * (kTiles * 2), values);
#pragma unroll
          for (int i = 0; i < Tile::run; ++i) sums[row][first / 8 + i / 2][lower * 2 + i % 2] = values[i];
        }
      }
    }
  }
};

// IEEE float32 fused multiply-adds: a thread owns every second of 16 pixels of a row and COLUMNS / 8 columns, 8 apart.
template <class Tile>
struct FmaProduct {
  static constexpr int columns = Tile::columns / 8;
  static_assert(Tile::threads == Tile::rows * 16 && Tile::pair == 1 && Tile::run == columns);
  float sums[8][columns];

  __device__ __forceinline__ void multiply(const unsigned char* halo, const unsigned char* weights) {
    const int owner = threadIdx.x % 8, first_pixel = threadIdx.x / 16 * kHaloWidth + threadIdx.x / 8 % 2;
    // Three levels of sums (8 channels, 9 taps, chunks): one chain over 9 Cin products has over twice the error of a blocked
    // convolution, and one over its parts of eight still does from some 160 channels on.
    float chunk[8][columns] = {};
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap) {
      const int shifted = first_pixel + tap / 3 * kHaloWidth + tap % 3;
      Pack<float> pixels[8][2];
#pragma unroll
      for (int p = 0; p < 8; ++p) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          pixels[p][half] = *reinterpret_cast<const Pack<float>*>(halo + row_offset(shifted + 2 * p, half));
        }
      }
#pragma unroll
      for (int c = 0; c < columns; ++c) {
        Pack<float> weight[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          weight[half] = *reinterpret_cast<const Pack<float>*>(weights + row_offset(tap * Tile::columns + owner + 8 * c, half));
        }
#pragma unroll
        for (int p = 0; p < 8; ++p) {
          float partial = pixels[p][0].v[0] * weight[0].v[0];
#pragma unroll
          for (int k = 1; k < 8; ++k) partial = fmaf(pixels[p][k / 4].v[k % 4], weight[k / 4].v[k % 4], partial);
          chunk[p][c] += partial;
        }
      }
    }
#pragma unroll
    for (int p = 0; p < 8; ++p) {
#pragma unroll
      for (int c = 0; c < columns; ++c) sums[p][c] += chunk[p][c];
    }
  }

  // As MmaProduct's.
  template <class Visit>
  __device__ __forceinline__ void for_each_run(Visit visit) {
#pragma unroll
    for (int p = 0; p < 8; ++p) visit(threadIdx.x / 16, threadIdx.x / 8 % 2 + 2 * p, threadIdx.x % 8 * columns, sums[p]);
  }
};

// A thread of the tensor cores' product holds pairs of neighbouring columns, one of the other's single ones.
template <class T, class Tile>
using ConvProduct = std::conditional_t<Tile::pair == 2, MmaProduct<T, Tile>, FmaProduct<Tile>>;

// Columns of a tile: few for the last layers (3 channels), else whatever of 64 and 32 pads less; wider reuses the halo more.
inline int conv3x3_tile_columns(int cout) {
  if (cout <= 16) return 16;
  return (cout + 63) / 64 * 64 > (cout + 31) / 32 * 32 ? 32 : 64;
}

// How products are computed, and with which tile for a number of columns.
struct TensorCores {  // bf16, f16; float32 rounded to tf32
  template <class Visit>
  static auto with_tile(int cout, Visit visit) {
    switch (conv3x3_tile_columns(cout)) {
      case 64: return visit(ConvTile<16, 64, 256, 2, 2>{});
      case 32: return visit(ConvTile<16, 32, 128, 4, 2>{});
      default: return visit(ConvTile<16, 16, 128, 4, 2>{});
    }
  }
};
struct FusedMultiplyAdds {  // float32 with IEEE products
  template <class Visit>
  static auto with_tile(int cout, Visit visit) {
    switch (conv3x3_tile_columns(cout)) {
      case 64: return visit(ConvTile<8, 64, 128, 2, 1>{});
      case 32: return visit(ConvTile<8, 32, 128, 3, 1>{});
      default: return visit(ConvTile<8, 16, 128, 4, 1>{});
    }
  }
};
template <class T>
using ExactProducts = std::conditional_t<std::is_same_v<T, float>, FusedMultiplyAdds, TensorCores>;

}  // namespace fastsr::cuda
