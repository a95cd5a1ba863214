// The 3x3 convolution engine for AMX: a tile instruction multiplies 16 pixels x 32 channels by 32 x 16 weights.
//
//                  16 outputs   16 outputs        Six accumulator tiles: 48 pixels x 32 output channels. Per tap and 32 input
//                 +------------+------------+     channels: 2 tiles of weights (B), 3 of pixels (A, two of which are loaded
//    16 pixels    |   tmm0     |   tmm3     |     again for the second half of the outputs), 6 products. The last blocks of
//                 +------------+------------+     a row have two tiles or one: then A and B have two registers each.
//    16 pixels    |   tmm1     |   tmm4     |
//                 +------------+------------+     A comes straight from the channels-last rows: a tile row is a pixel, the
//    16 pixels    |   tmm2     |   tmm5     |     stride its distance to the next. Only the taps that cross the row's ends
//                 +------------+------------+     read copies with zeros (RowInput).
//
// Tails      The last tile of a row overlaps the one before: the same products in the same order, and only the new pixels are
//            kept. A row of fewer than 16 pixels is copied into one with zeros.
// Lives in   tmm0-5: sums    tmm6: pixels    tmm7: weights    L1: 32 channels of 50 pixels, the sums of two blocks
//            L2: the group's weights, 9 * C * 64 bytes, read in the order in which they lie
// Overlap    The epilogue of a block runs a few pixels at a time between the products of the next, also across rows. So do the
//            prefetches of the block's outputs and of the next row's pixels.
// Order      row, 32 channels, column: the same for every pixel.
// Limit      16 cycles a product; then 8 tile loads of 8 cycles for 6 products, and the L2 lines of the weights.
//
// What was tried: GFLOP/s of one core on random values (roof 3170), minimum of many; rows in L2 unless said.
//                                                              predicted             192 -> 32 at W = 256 / 64 -> 64 at W = 48
//   v1 2 x 2 tiles; order row, column, channels                60% of the roof       1613 / 1173
//   v2 order row, channels, column; 3 x 2 tiles                +15%: L1, weights     1662 / 1134; 192 -> 64 at W = 48: 1243 -> 1452
//   v3 plain epilogue inline: maximum, vcvtne2ps2bf16          +5%                   1933 / 1334, as fast as with no epilogue at all
//   v4 prefetches spread over the products, outputs too        picture from L3 +30%  v1 -> v4 at 256 x 256: 64 -> 64 873 -> 1366,
//                                                                                    192 -> 32 1036 -> 1170
//   v5 several rows a call: one ldtilecfg, epilogue overlaps   +10% at W = 48        64 -> 32 at W = 48: 1152 -> 1175-1249
//   2 x 2 tiles instead of 3 x 2                               -                     dense block: 1141-1220 against 1195-1316 at W = 256,
//                                                                                    1003-1026 against 1139-1185 at W = 48
//   2 x 2 tiles that span rows                                 +5% at W = 48         dense block: 1200-1270, 1130: dropped
//   6 x 1 and 4 x 1 tiles, the loop alone                      fewer weights         1400, 1650 against 2000 of 2 x 2: dropped
// The loop alone, without edges and epilogue, reaches 2000 on random values and 2500 on zeros; the roof is the same on both.
// Left: the copies of the row's ends, 10-15% at W = 48.
//
// Dense block, 64 features, 4 x 32 growths, one thread: 1x256x256 1230-1270, 16x48x48 1180-1260; eager channels-last of torch 2.13
// beside it, concatenations included, 560 and 670-700.
#if defined(__x86_64__)
#define FASTSR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16,prfchw"
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

constexpr int TILES = 3;  // of pixels in a block

// A run of pixels and a group of outputs. The sums of pixel `begin` are at kPixels * width: the last tile of a row starts before
// the run where it would end beyond the row (the same products in the same order; only the run's own pixels are kept).
struct Block {
  const RowJob* job;
  int64_t o, begin, end, width;
  int64_t done;  // pixels before this one have left the epilogue
  int tiles;
  bool plain;     // bias and activation alone
  int vectors;    // of `finishes`
  Finish<BFloat16> finishes[VECTORS];
  int64_t start[TILES];
  const char* tap[TILES][9];  // where each tap's pixels lie; null outside the image
  alignas(64) float sums[(TILES + 1) * kPixels * GROUP];
};

// Two vectors as 32 bfloat16. The instruction flushes denormals, whose sign a backward reads: those go the long way.
FASTSR_INLINE void store_pair(BFloat16* p, Vector low, Vector high) {
  constexpr int kDenormal = 0x20;
  if (_mm512_fpclass_ps_mask(low, kDenormal) | _mm512_fpclass_ps_mask(high, kDenormal)) [[unlikely]] {
    store_as(p, low, LANES);
    store_as(p + LANES, high, LANES);
  } else {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// Bias and activation alone, for `pixels` pixels of 32 outputs. For a slope in [0, 1] the activation is a maximum.
FASTSR_INLINE void finish_plain(const RowJob& job, const float* sums, int64_t column, int64_t pixels, int64_t o) {
  const float* bias = job.conv->bias + o;
  const Vector low_bias = load(bias), high_bias = load(bias + LANES), slope = set1(job.epilogue.slope);
  BFloat16* out = static_cast<BFloat16*>(job.out) + o + column * job.out_pixel;
  for (int64_t i = 0; i < pixels; ++i, sums += GROUP, out += job.out_pixel) {
    const Vector low = add(load(sums), low_bias), high = add(load(sums + LANES), high_bias);
    store_pair(out, _mm512_max_ps(mul(low, slope), low), _mm512_max_ps(mul(high, slope), high));
  }
}

// The epilogue of the next `count` pixels.
FASTSR_INLINE void finish_some(Block& block, int64_t count) {
  const RowJob& job = *block.job;
  const int64_t from = block.done, to = from + count < block.end ? from + count : block.end;
  if (from == to) return;
  const float* sums = block.sums + (kPixels + from - block.begin) * block.width;
  if (block.plain) {
    finish_plain(job, sums, from, to - from, block.o);
  } else {
    for (int v = 0; v < block.vectors; ++v) finish(block.finishes[v], job, sums + v * LANES, block.width, from, static_cast<int>(to - from));
  }
  block.done = to;
}

// Asks for 32 channels of a third of the next row's pixels, and for the places of `share` outputs: all at once would fill the
// queues of the caches.
FASTSR_INLINE void fetch_some(const RowJob& job, const Block& block, int64_t dy, int64_t k, int64_t from, int64_t share) {
  const int64_t pixels = block.end - block.begin;
  if (job.ahead && block.o == 0) {
    const char* p = static_cast<const char*>(job.ahead) + k * 64;
    const int64_t stop = block.begin + pixels * (dy + 1) / 3;
    for (int64_t i = block.begin + pixels * dy / 3; i < stop; ++i) __builtin_prefetch(p + i * job.ahead_pixel * 2, 0, 2);
  }
  const char* out = static_cast<const char*>(job.out) + block.o * 2;
  for (int64_t i = from; i < from + share && i < block.end; ++i) __builtin_prefetch(out + i * job.out_pixel * 2, 1, 3);
}

// The sums of M tiles of pixels and N of outputs; the epilogue of the block before runs meanwhile, a few pixels at a time.
template <int M, int N>
static __attribute__((noinline)) void multiply(const RowJob& job, Block& block, Block& before, const char* weights) {
  constexpr int64_t kWidth = N * 64, kChannels = 3 * kWidth;  // bytes of the outputs of one tap; from two channels to the next two
  const int64_t steps = job.conv->cin / kUnit, pixel = job.x_pixel * 2;
  const int64_t share = (before.end - before.done + 2 * steps - 1) / (2 * steps);  // two of the three rows of taps may be all there is
  const int64_t places = (block.end - block.begin + 3 * steps - 1) / (3 * steps);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if constexpr (M > 2) {
    _tile_zero(4);
    _tile_zero(5);
  }
  for (int dy = 0; dy < 3; ++dy) {
    if (!block.tap[0][dy * 3 + 1]) {
      weights += steps * 16 * kChannels;
      continue;
    }
    for (int64_t k = 0; k < steps; ++k, weights += 16 * kChannels) {
      for (int dx = 0; dx < 3; ++dx) {
        const int tap = dy * 3 + dx;
        const char* w = weights + dx * kWidth;
        if constexpr (M < 3) {
          _tile_loadd(4, block.tap[0][tap] + k * 64, pixel);
          _tile_loadd(6, w, kChannels);
          _tile_dpbf16ps(0, 4, 6);
          if constexpr (M > 1) {
            _tile_loadd(5, block.tap[1][tap] + k * 64, pixel);
            _tile_dpbf16ps(1, 5, 6);
          }
          if constexpr (N > 1) {
            _tile_loadd(7, w + 64, kChannels);
            _tile_dpbf16ps(2, 4, 7);
            if constexpr (M > 1) _tile_dpbf16ps(3, 5, 7);
          }
        } else {
          _tile_loadd(7, w, kChannels);
          _tile_loadd(6, block.tap[0][tap] + k * 64, pixel);
          _tile_dpbf16ps(0, 6, 7);
          _tile_loadd(6, block.tap[1][tap] + k * 64, pixel);
          _tile_dpbf16ps(1, 6, 7);
          _tile_loadd(6, block.tap[2][tap] + k * 64, pixel);
          _tile_dpbf16ps(2, 6, 7);
          if constexpr (N > 1) {
            _tile_loadd(7, w + 64, kChannels);
            _tile_dpbf16ps(5, 6, 7);
            _tile_loadd(6, block.tap[1][tap] + k * 64, pixel);
            _tile_dpbf16ps(4, 6, 7);
            _tile_loadd(6, block.tap[0][tap] + k * 64, pixel);
            _tile_dpbf16ps(3, 6, 7);
          }
        }
      }
      finish_some(before, share);
      fetch_some(job, block, dy, k, block.begin + (dy * steps + k) * places, places);
    }
  }
  float* out[TILES];
  for (int t = 0; t < M; ++t) out[t] = block.sums + (kPixels + block.start[t] - block.begin) * N * LANES;
  _tile_stored(0, out[0], kWidth);
  if constexpr (M > 1) _tile_stored(1, out[1], kWidth);
  if constexpr (M > 2) _tile_stored(2, out[2], kWidth);
  if constexpr (M < 3 && N > 1) _tile_stored(2, out[0] + LANES, kWidth);
  if constexpr (M > 2 && N > 1) _tile_stored(3, out[0] + LANES, kWidth);
  if constexpr (M == 2 && N > 1) _tile_stored(3, out[1] + LANES, kWidth);
  if constexpr (M > 2 && N > 1) {
    _tile_stored(4, out[1] + LANES, kWidth);
    _tile_stored(5, out[2] + LANES, kWidth);
  }
}

static void find_taps(const RowJob& job, int64_t column, const char** tap) {
  const int64_t pixel = job.x_pixel * 2;
  for (int dy = 0; dy < 3; ++dy) {
    const char* row = static_cast<const char*>(job.x[dy]);
    for (int dx = 0; dx < 3; ++dx) tap[dy * 3 + dx] = row ? row + (column + dx - 1) * pixel : nullptr;
    if (column == 0 && job.left[dy]) tap[dy * 3] = static_cast<const char*>(job.left[dy]);
    if (column + kPixels == job.width && job.right[dy]) tap[dy * 3 + 2] = static_cast<const char*>(job.right[dy]);
  }
}

static void rows(const RowJob* jobs, int64_t job_count) {
  static constexpr void (*kMultiply[2][TILES])(const RowJob&, Block&, Block&, const char*) = {
      {&multiply<1, 1>, &multiply<2, 1>, &multiply<3, 1>}, {&multiply<1, 2>, &multiply<2, 2>, &multiply<3, 2>}};
  Block blocks[2];
  blocks[1].job = jobs, blocks[1].done = blocks[1].end = 0;
  int turn = 0;
  __asm__ volatile("ldtilecfg %0" ::"m"(kConfig));
  for (int64_t i = 0; i < job_count; ++i) {
    const RowJob& job = jobs[i];
    const Epilogue& e = job.epilogue;
    const bool bare = e.scale == 1.f && e.scale2 == 1.f && !e.gate && !e.mask && !e.skip && !e.skip2 && !e.out_lanes;
    const bool plain = bare && e.slope > 0.f && e.slope <= 1.f;
    const int64_t tiles = (job.end - job.begin + kPixels - 1) / kPixels, count = (tiles + TILES - 1) / TILES;
    for (int64_t o = 0; o < job.conv->cout; o += GROUP) {
      const int vectors = job.conv->cout - o > LANES ? 2 : 1;
      const char* weights = job.conv->weights + o * 9 * job.conv->cin * 2;
      for (int64_t b = 0; b < count; ++b, turn ^= 1) {
        Block &block = blocks[turn], &before = blocks[turn ^ 1];
        const int64_t first = tiles * b / count;
        block.job = &job;
        block.tiles = static_cast<int>(tiles * (b + 1) / count - first);
        block.plain = plain && job.conv->cout - o >= GROUP;
        block.vectors = block.plain ? 0 : epilogue_of(job, o, vectors, block.finishes);
        block.o = o, block.width = vectors * LANES;
        block.begin = block.done = job.begin + first * kPixels;
        block.end = block.begin + block.tiles * kPixels < job.end ? block.begin + block.tiles * kPixels : job.end;
        for (int t = 0; t < block.tiles; ++t) {
          const int64_t c = block.begin + t * kPixels;
          block.start[t] = c + kPixels <= job.end ? c : job.end > kPixels ? job.end - kPixels : 0;
          find_taps(job, block.start[t], block.tap[t]);
        }
        kMultiply[vectors - 1][block.tiles - 1](job, block, before, weights);
        finish_some(before, before.end);
      }
    }
  }
  finish_some(blocks[turn ^ 1], blocks[turn ^ 1].end);
  _tile_release();
}

static void copy(const void* from, void* to, int64_t count) { __builtin_memcpy(to, from, count * sizeof(BFloat16)); }

// A pixel of 32, 64, ... channels is a whole number of vectors.
static void gather_pixels(const char* from, int64_t stride, char* to, int64_t bytes, int64_t count) {
  for (int64_t i = 0; i < count; ++i, from += stride, to += stride) {
    for (int64_t b = 0; b < bytes; b += 64) _mm512_storeu_si512(to + b, _mm512_loadu_si512(from + b));
  }
}

extern const Kernel bfloat16 = {
    "bfloat16 tiles", Element::bf16, LANES, VECTORS, kUnit, 0,
    {nullptr, &rows, nullptr},
    {nullptr, &copy, nullptr}, &gather_pixels,
};

}  // namespace fastsr::cpu::amx

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
