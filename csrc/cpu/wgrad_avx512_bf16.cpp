// Weight gradients of 3x3 convolutions for AVX512-BF16: a step multiplies two pixels and adds both products.
//
// A row of x is laid out twice, as pairs of pixels (2k, 2k + 1) and (2k - 1, 2k), zero outside the image: the middle tap reads the
// first, the outer taps the second from pair 0 and pair 1 on. g is laid out once. Measured where vdpbf16ps has a quarter of vfmadd's
// rate: 92% of that roof, but 0.65 of the speed of float32; on processors that issue both alike: not measured yet.
#if defined(__x86_64__)
#define FASTSR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"
#include "cpu/target.h"
#include "cpu/wgrad_engine.h"

namespace fastsr::cpu::avx512_bf16 {

#define FASTSR_LANES 16
#include "cpu/vector.h"
#include "cpu/wgrad_kernel.h"

struct Pairs {
  static constexpr int kUnit = 2;
  using Operand = __m512bh;
  FASTSR_INLINE Operand input(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
  FASTSR_INLINE Operand broadcast(const char* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  FASTSR_INLINE Vector multiply_add(Operand g, Operand x, Vector sum) { return _mm512_dpbf16_ps(sum, g, x); }
};

// Values of one pixel, as the low halves of 16 pairs; none if the pixel lies outside.
FASTSR_INLINE __m512i low_halves(const BFloat16* p, int64_t pixel, int64_t stride, int64_t width, __mmask16 lanes) {
  const __mmask16 inside = pixel >= 0 && pixel < width ? lanes : 0;
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, inside ? p + pixel * stride : p));
}

FASTSR_INLINE __m512i pair(__m512i a, __m512i b) { return _mm512_or_si512(a, _mm512_slli_epi32(b, 16)); }

FASTSR_INLINE void read_input(Pairs, const BFloat16* from, int64_t stride, int64_t width, int64_t channels, int64_t begin, int64_t end,
                              char* to) {
  const int vectors = channels > LANES ? 2 : 1;
  const int64_t steps = (end - begin + 1) / 2, step = vectors * LANES * kStepBytes;
  for (int v = 0; v < vectors; ++v) {
    const __mmask16 lanes = first(lanes_left(channels, v * LANES));
    const BFloat16* p = from + v * LANES;
    char *even = to + v * LANES * kStepBytes, *odd = even + steps * step;
    __m512i before = low_halves(p, begin - 1, stride, width, lanes);
    for (int64_t c = begin; c < begin + 2 * steps; c += 2, even += step, odd += step) {
      const __m512i a = low_halves(p, c, stride, width, lanes), b = low_halves(p, c + 1, stride, width, lanes);
      _mm512_storeu_si512(even, pair(a, b));
      _mm512_storeu_si512(odd, pair(before, a));
      before = b;
    }
    _mm512_storeu_si512(odd, pair(before, low_halves(p, begin + 2 * steps, stride, width, lanes)));
  }
}

FASTSR_INLINE void read_gradient(Pairs, const BFloat16* from, int64_t stride, int64_t pixels, int count, char* to, float* bias,
                                 float* lost) {
  const __mmask16 lanes = first(count);
  Vector sum = set1(0.f);
  for (int64_t c = 0; c < pixels; c += 2, to += count * kStepBytes) {  // a pixel beyond the segment belongs to the next one
    const __m512i a = low_halves(from, c, stride, pixels, lanes), b = low_halves(from, c + 1, stride, pixels, lanes);
    _mm512_storeu_si512(to, pair(a, b));
    sum = add(sum, add(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16))));
  }
  add_exactly(bias, lost, sum, count);
}

FASTSR_INLINE void set_steps(Pairs, Segment& s, int64_t dx, int64_t begin, int64_t end, int64_t, int64_t x_step) {
  s.steps = (end - begin + 1) / 2;
  if (dx != 1) s.x += (s.steps + dx / 2) * x_step;
}

extern const WeightGradientKernel weight_gradient = {
    "bfloat16 pairs", kMaxChannels, kMaxOutputs, BLOCK, &scratch_bytes<Pairs>, {nullptr, &run_task<Pairs, BFloat16>, nullptr},
};

}  // namespace fastsr::cpu::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
