// Weight gradients of 3x3 convolutions for AMX: a tile instruction multiplies 16 output channels x 32 pixels by 32 x 16 input channels.
//
//                 16 inputs    16 inputs         Four accumulator tiles of one tap: 32 output x 32 input channels. Per 32 pixels:
//               +------------+------------+      2 tiles of g (A), 2 of x (B), 4 products.
//   16 outputs  |   tmm0     |   tmm1     |
//               +------------+------------+      A: g transposed, [output][pixel].   B: x by pairs, [pixel / 2][input][2].
//   16 outputs  |   tmm2     |   tmm3     |
//               +------------+------------+      Both lay the rows of a segment end to end, `pitch` pixels apart: at least two more
//                                                than a row has, zero in g, so that one run of 32s covers all rows.
// Taps       A tap's column shifts A's address by that many pixels, its row shifts B's by whole rows (pitch is even).
// Lives in   tmm0-3: sums    tmm4-5: g    tmm6-7: x    L1: x of a segment for 32 channels (22 KB at 48 columns), g for 32 (16 KB)
//            L2: the sums of the task, 36 KB per 32 x 32 channels
// Copies     Each pixel once per task: x at 2 shuffles per 2 pixels x 32 channels, g at 160 per 32 x 32.
// Borders    Pixels outside the image are zeros; so a gradient that is not finite makes NaN of sums that lack it.
// Limit      The tile unit: 16 cycles per product, 18 cycles per pixel and 32 x 32 channels. Two taps of three load A across cache
//            lines, which alone costs a quarter of the roof; segments longer than L1 cost far more (384 pixels: 30% slower).
//
// predicted / measured, the five convolutions of a dense block, one thread, of a 3.1 TFLOP/s tile roof (a busy machine):
//   16x48x48    45% / 21% (oneDNN channels-last 19%)      1x128x128   45% / 24% (oneDNN 16%)
//   The products run at 55 to 60% of the roof while all is in L1; about a third of the time goes into the copies.
#if defined(__x86_64__)
#define FASTSR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16"
#include "cpu/target.h"
#include "cpu/wgrad_engine.h"

namespace fastsr::cpu::amx {

#define FASTSR_LANES 16
#include "cpu/vector.h"
#include "cpu/wgrad_kernel.h"

constexpr int64_t kDepth = 32;  // pixels of a product
constexpr int64_t kMaxColumns = 254, kSegment = 260;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static constexpr TileConfig kConfig;
alignas(64) static constexpr uint16_t kZeros[kMaxChannels] = {};  // a pixel

struct Tiling {
  Plan plan;        // its places, blocks and sums
  int64_t pitch;    // pixels from a row to the next
  int64_t steps;    // products of 32 pixels that cover a segment
  int64_t x_half;   // bytes of 16 channels of x; two to a block
  int64_t g_row;    // bytes of an output channel of g: 32 zeros, then the segment
  int64_t pixels_at;
};

static Tiling plan_tiles(const WeightGradientTask& task) {
  Tiling t{};
  Plan& p = t.plan;
  const int64_t padded = (task.outputs + BLOCK - 1) / BLOCK * BLOCK;
  p.columns = in_parts(task.width, kMaxColumns);
  t.pitch = (p.columns + 3) / 2 * 2;
  p.rows = in_parts(task.height, at_least(1, kSegment / t.pitch));
  p.blocks = (task.channels + BLOCK - 1) / BLOCK;
  t.steps = (p.rows * t.pitch + kDepth - 1) / kDepth;
  t.x_half = (2 * t.pitch + t.steps * kDepth) * 2 * LANES;
  t.g_row = (t.steps + 1) / 2 * 128 + 64;  // an odd number of cache lines: 16 rows fall into different sets
  p.sums_tap = padded * BLOCK;
  p.x_at = p.blocks * 9 * p.sums_tap * 4;
  p.g_at = p.x_at + p.blocks * 2 * t.x_half;
  p.bias_at = p.g_at + padded * t.g_row;
  t.pixels_at = p.bias_at + 2 * padded * 4;
  p.bytes = t.pixels_at + at_least(t.steps * kDepth, t.pitch) * static_cast<int64_t>(sizeof(void*));
  return t;
}

// sums[output][32] += the products of `steps` x 32 pixels, for M x 16 outputs and 32 inputs.
template <int M>
static __attribute__((noinline)) void multiply(const char* g, int64_t g_row, const char* x, int64_t x_half, int64_t steps, float* sums) {
  constexpr int64_t kRow = BLOCK * 4;
  __asm__ volatile("" ::: "memory");  // tile loads do not tell GCC which memory they read
  _tile_loadd(0, sums, kRow);
  _tile_loadd(1, sums + LANES, kRow);
  if (M > 1) _tile_loadd(2, sums + LANES * BLOCK, kRow);
  if (M > 1) _tile_loadd(3, sums + LANES * BLOCK + LANES, kRow);
  for (; steps > 0; --steps, g += 64, x += 1024) {
    _tile_loadd(4, g, g_row);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, x + x_half, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (M > 1) {
      _tile_loadd(5, g + 16 * g_row, g_row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + LANES, kRow);
  if (M > 1) _tile_stored(2, sums + LANES * BLOCK, kRow);
  if (M > 1) _tile_stored(3, sums + LANES * BLOCK + LANES, kRow);
  __asm__ volatile("" ::: "memory");
}

FASTSR_INLINE __mmask32 channels_from(int64_t channels, int64_t from) {
  return channels - from >= BLOCK ? ~0u : (1u << (channels - from)) - 1;
}

// A row of x (null: outside the image) by pairs. unpack leaves channels 8i..8i+3 of a block in its first half, 8i+4..8i+7 in
// its second; `in_order` puts the sums right.
static void pair_row(const WeightGradientTask& task, const Tiling& t, const BFloat16* row, const Place& at, const BFloat16** pixels,
                     char* to) {
  const BFloat16* zeros = reinterpret_cast<const BFloat16*>(kZeros);
  for (int64_t i = 0; i < t.pitch; ++i) {
    const int64_t c = at.begin - 1 + i;
    pixels[i] = row && c >= 0 && c < task.width && c <= at.end ? row + c * task.x.w : zeros;
  }
  for (int64_t b = 0; b < t.plan.blocks; ++b, to += 2 * t.x_half) {
    const __mmask32 mask = channels_from(task.channels, b * BLOCK);
    char* out = to;
    for (int64_t i = 0; i < t.pitch; i += 2, out += 64) {
      const __m512i even = _mm512_maskz_loadu_epi16(mask, pixels[i] + b * BLOCK);
      const __m512i odd = _mm512_maskz_loadu_epi16(mask, pixels[i + 1] + b * BLOCK);
      _mm512_store_si512(out, _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(out + t.x_half, _mm512_unpackhi_epi16(even, odd));
    }
  }
}

// A segment of g, transposed; adds it to the bias's gradient if that is asked for.
static void transpose_gradient(const WeightGradientTask& task, const Tiling& t, const Place& at, const BFloat16** pixels,
                               char* to, float* bias) {
  const BFloat16* g = static_cast<const BFloat16*>(task.g.data) + at.n * task.g.n + at.begin * task.g.w;
  const int64_t columns = at.end - at.begin;
  int64_t q = 0;
  for (int64_t y = at.top; y < at.bottom; ++y) {
    const BFloat16* row = g + y * task.g.h;
    for (int64_t c = 0; c < columns; ++c) pixels[q++] = row + c * task.g.w;
    for (int64_t c = columns; c < t.pitch; ++c) pixels[q++] = reinterpret_cast<const BFloat16*>(kZeros);
    for (int64_t o = 0; task.dbias && o < task.outputs; o += LANES) {
      Vector sum = set1(0.f);
      for (int64_t c = 0; c < columns; ++c) sum = add(sum, load_as(row + c * task.g.w + o, lanes_left(task.outputs, o)));
      add_exactly(bias + o, bias + task.outputs + o, sum, lanes_left(task.outputs, o));
    }
  }
  for (; q < t.steps * kDepth; ++q) pixels[q] = reinterpret_cast<const BFloat16*>(kZeros);
  for (int64_t o = 0; o < task.outputs; o += BLOCK) {
    const __mmask32 mask = channels_from(task.outputs, o);
    for (int64_t k = 0; k < t.steps; ++k) {
      const BFloat16** p = pixels + k * kDepth;
      char* out = to + o * t.g_row + 64 + k * 64;
      __m512i low[16], high[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __m512i even = _mm512_maskz_loadu_epi16(mask, p[2 * i] + o);
        const __m512i odd = _mm512_maskz_loadu_epi16(mask, p[2 * i + 1] + o);
        low[i] = _mm512_unpacklo_epi16(even, odd), high[i] = _mm512_unpackhi_epi16(even, odd);
      }
      transpose(low);
      transpose(high);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int channel = i / 4 * 8 + i % 4;
        _mm512_store_si512(out + channel * t.g_row, low[i]);
        _mm512_store_si512(out + (channel + 4) * t.g_row, high[i]);
      }
    }
  }
}

// Undoes the order of channels that `pair_row` made.
static void in_order(float* sums, int64_t rows) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < rows; ++i, sums += BLOCK) {
    const Vector low = load(sums), high = load(sums + LANES);
    store(sums, _mm512_permutex2var_ps(low, first, high));
    store(sums + LANES, _mm512_permutex2var_ps(low, second, high));
  }
}

static void run_tiles(const WeightGradientTask& task) {
  const Tiling t = plan_tiles(task);
  const Plan& plan = t.plan;
  char* scratch = static_cast<char*>(task.scratch);
  float *sums = reinterpret_cast<float*>(scratch), *bias = reinterpret_cast<float*>(scratch + plan.bias_at);
  const BFloat16** pixels = reinterpret_cast<const BFloat16**>(scratch + t.pixels_at);
  char *x = scratch + plan.x_at, *g = scratch + plan.g_at;
  __builtin_memset(scratch, 0, t.pixels_at);
  __asm__ volatile("ldtilecfg %0" ::"m"(kConfig));
  const int64_t row_bytes = t.pitch * 2 * LANES;
  Place at{0, 0, 0, 0, 0};
  set_place(task, plan, &at);
  while (task.batch > 0 && task.height > 0 && at.begin < task.width) {
    const BFloat16* picture = static_cast<const BFloat16*>(task.x.data) + at.n * task.x.n;
    int64_t y = at.top - 1;
    if (at.top > 0) {  // the segment before had the two rows above
      for (int64_t half = 0; half < 2 * plan.blocks; ++half) {
        __builtin_memmove(x + half * t.x_half, x + half * t.x_half + plan.rows * row_bytes, 2 * row_bytes);
      }
      y += 2;
    }
    for (; y < at.top + plan.rows + 1; ++y) {
      const bool inside = y >= 0 && y < task.height;
      pair_row(task, t, inside ? picture + y * task.x.h : nullptr, at, pixels, x + (y - at.top + 1) * row_bytes);
    }
    transpose_gradient(task, t, at, pixels, g, bias);
    for (int64_t block = 0; block < plan.blocks; ++block) {
      for (int64_t dy = task.first_tap; dy < task.last_tap; ++dy) {
        for (int64_t o = 0; o < task.outputs; o += BLOCK) {
          for (int64_t dx = 0; dx < 3; ++dx) {
            const char *a = g + o * t.g_row + 64 - 2 * dx, *b = x + block * 2 * t.x_half + dy * row_bytes;
            float* to = sums + (block * 9 + dy * 3 + dx) * plan.sums_tap + o * BLOCK;
            const auto product = task.outputs - o > LANES ? &multiply<2> : &multiply<1>;
            product(a, t.g_row, b, t.x_half, t.steps, to);
          }
        }
      }
    }
    at = following(task, plan, at);
  }
  _tile_release();
  in_order(sums, plan.blocks * 9 * plan.sums_tap / BLOCK);
  write_results<BFloat16>(task, sums, plan.sums_tap, BLOCK, bias);
}

static int64_t tiles_bytes(const WeightGradientTask& task) { return plan_tiles(task).plan.bytes; }

extern const WeightGradientKernel weight_gradient = {
    "bfloat16 tiles", kMaxChannels, kMaxOutputs, BLOCK, &tiles_bytes, {nullptr, &run_tiles, nullptr},
};

}  // namespace fastsr::cpu::amx

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
