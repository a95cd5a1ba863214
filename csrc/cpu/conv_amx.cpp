// The 3x3 convolution engine for AMX: a tile instruction multiplies 16 pixels x 32 channels by 32 x 16 weights.
//
//                  16 outputs   16 outputs        Four accumulator tiles: 32 pixels x 32 output channels. Per tap and 32 input
//                 +------------+------------+     channels: 2 tiles of pixels (A), 2 of weights (B), 4 products.
//    16 pixels    |   tmm0     |   tmm1     |
//                 +------------+------------+     A comes straight from the channels-last rows: a tile row is a pixel, the
//    16 pixels    |   tmm2     |   tmm3     |     stride its distance to the next. Only the taps that cross the row's ends
//                 +------------+------------+     read copies with zeros (RowInput).
//
// Tails      The last tile of a row overlaps the one before: the same products in the same order, and only the new pixels are
//            stored. A row of fewer than 16 pixels is copied into one with zeros.
// Lives in   tmm0-3: sums    tmm4-5: pixels    tmm6-7: weights    L2: the group's weights, 9 * C * 64 bytes
// Overlap    The epilogue of a block runs while the products of the next are under way: +9% at 48 pixels.
// Order      row, column, 32 channels: the same for every pixel.
// Limit      16 cycles a product; then tile loads, 4 for 4 products, whose weights come from L2.
//
// predicted / measured, share of the tile roof of one core (3.2 TFLOP/s bf16): rows alone 60% / 47-50%; the whole operator 50% / 23-27%
// for 64 -> 32, 25-35% for 64..192 -> 64 and 192 -> 32; eager channels-last of torch 2.13 beside it: 26-41%.
#if defined(__x86_64__)
#define FASTSR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16"
#include "cpu/target.h"
#include "cpu/conv_engine.h"

namespace fastsr::cpu::amx {

#define FASTSR_LANES 16
#include "cpu/vector.h"
#include "cpu/conv_kernel.h"

constexpr int64_t kPixels = kEdge, kUnit = 32;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static constexpr TileConfig kConfig;

// One tile of pixels: where each tap's pixels lie.
struct Pixels {
  const char* tap[9];
  int64_t stride[9];  // bytes
};

// sums[pixel][N * 16] of M tiles of pixels.
template <int M, int N>
static __attribute__((noinline)) void multiply(const Pixels* pixels, const char* weights, int64_t steps, float* sums) {
  constexpr int64_t kWidth = N * 64, kChannels = 3 * kWidth;  // bytes of the outputs of one tap; from two channels to the next two
  _tile_zero(0);
  if (N > 1) _tile_zero(1);
  if (M > 1) _tile_zero(2);
  if (M > 1 && N > 1) _tile_zero(3);
  for (int dy = 0; dy < 3; ++dy, weights += steps * 16 * kChannels) {
    if (!pixels[0].tap[dy * 3 + 1]) continue;
    for (int dx = 0; dx < 3; ++dx) {
      const char *first = pixels[0].tap[dy * 3 + dx], *second = pixels[M - 1].tap[dy * 3 + dx], *w = weights + dx * kWidth;
      const int64_t first_stride = pixels[0].stride[dy * 3 + dx], second_stride = pixels[M - 1].stride[dy * 3 + dx];
      for (int64_t k = 0; k < steps; ++k, first += 64, second += 64, w += 16 * kChannels) {
        _tile_loadd(4, first, first_stride);
        _tile_loadd(6, w, kChannels);
        _tile_dpbf16ps(0, 4, 6);
        if (M > 1) {
          _tile_loadd(5, second, second_stride);
          _tile_dpbf16ps(2, 5, 6);
        }
        if (N > 1) {
          _tile_loadd(7, w + 64, kChannels);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  char* out = reinterpret_cast<char*>(sums);
  _tile_stored(0, out, kWidth);
  if (N > 1) _tile_stored(1, out + 64, kWidth);
  if (M > 1) _tile_stored(2, out + 16 * kWidth, kWidth);
  if (M > 1 && N > 1) _tile_stored(3, out + 16 * kWidth + 64, kWidth);
}

static void find_taps(const RowJob& job, int64_t column, Pixels* to) {
  const int64_t pixel = job.x_pixel * 2, copied = job.conv->cin * 2;
  for (int dy = 0; dy < 3; ++dy) {
    for (int dx = 0; dx < 3; ++dx) {
      const char* row = static_cast<const char*>(job.x[dy]);
      const bool left = dx == 0 && column == 0 && job.left[dy];
      const bool right = dx == 2 && column + kPixels == job.width && job.right[dy];
      const void* edge = left ? job.left[dy] : right ? job.right[dy] : nullptr;
      to->tap[dy * 3 + dx] = edge ? static_cast<const char*>(edge) : row ? row + (column + dx - 1) * pixel : nullptr;
      to->stride[dy * 3 + dx] = edge ? copied : pixel;
    }
  }
}

// Up to two tiles of pixels from `column` on, whose sums await the epilogue; tile t starts at pixel start[t] <= column + 16 t.
struct Block {
  int64_t o, column, start[2];
  int tiles, width;
  alignas(64) float sums[2 * kPixels * GROUP];
};

template <class T>
static void finish_block(const RowJob& job, const Block& block) {
  for (int t = 0; t < block.tiles; ++t) {
    const int64_t from = block.column + t * kPixels, to = from + kPixels < job.end ? from + kPixels : job.end;
    const float* sums = block.sums + (t * kPixels + from - block.start[t]) * block.width;
    finish<T>(job, sums, block.width, from, static_cast<int>(to - from), block.o);
  }
}

template <class T>
static void row(const RowJob& job) {
  if (job.end <= job.begin) return;
  const int64_t steps = job.conv->cin / kUnit;
  Block blocks[2], *done = nullptr;  // a block's epilogue runs while the products of the next are under way
  int turn = 0;
  __asm__ volatile("ldtilecfg %0" ::"m"(kConfig));
  for (int64_t o = 0; o < job.conv->cout; o += GROUP) {
    const int vectors = job.conv->cout - o > LANES ? 2 : 1;
    const char* weights = job.conv->weights + o * 9 * job.conv->cin * 2;
    for (int64_t column = job.begin; column < job.end; column += 2 * kPixels, turn ^= 1) {
      Block& next = blocks[turn];
      next.o = o, next.column = column, next.tiles = 0, next.width = vectors * LANES;
      Pixels pixels[2];
      for (int64_t c = column; c < job.end && next.tiles < 2; c += kPixels, ++next.tiles) {
        next.start[next.tiles] = c + kPixels <= job.end ? c : job.end > kPixels ? job.end - kPixels : 0;
        find_taps(job, next.start[next.tiles], &pixels[next.tiles]);
      }
      if (o == 0) fetch_ahead(job, column, next.tiles == 2 ? 2 * kPixels : kPixels, job.x_pixel * 2, job.conv->cin * 2);
      if (vectors == 2) {
        next.tiles == 2 ? multiply<2, 2>(pixels, weights, steps, next.sums) : multiply<1, 2>(pixels, weights, steps, next.sums);
      } else {
        next.tiles == 2 ? multiply<2, 1>(pixels, weights, steps, next.sums) : multiply<1, 1>(pixels, weights, steps, next.sums);
      }
      if (done) finish_block<T>(job, *done);
      done = &next;
    }
  }
  finish_block<T>(job, *done);
  _tile_release();
}

static void copy(const void* from, void* to, int64_t count) { __builtin_memcpy(to, from, count * sizeof(BFloat16)); }

// A pixel of 32, 64, ... channels is a whole number of vectors.
static void gather_pixels(const char* from, int64_t stride, char* to, int64_t bytes, int64_t count) {
  for (int64_t i = 0; i < count; ++i, from += stride, to += bytes) {
    for (int64_t b = 0; b < bytes; b += 64) _mm512_storeu_si512(to + b, _mm512_loadu_si512(from + b));
  }
}

extern const Kernel bfloat16 = {
    "bfloat16 tiles", Element::bf16, LANES, VECTORS, kUnit,
    {nullptr, &row<BFloat16>, nullptr},
    {nullptr, &copy, nullptr}, &gather_pixels,
};

}  // namespace fastsr::cpu::amx

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
