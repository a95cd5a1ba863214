// The 3x3 convolution engine for AVX512-BF16: a step multiplies two input channels and adds both products.
//
// predicted / measured, share of the vdpbf16ps roof of one core: 90% / 88-92% (105-110 of 119 GFLOP/s where that instruction
// runs at a quarter of the FMA's rate, so that the float32 kernel on widened rows reaches 175-190 there).
#if defined(__x86_64__)
#define FASTSR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"
#include "cpu/target.h"
#include "cpu/conv_engine.h"

namespace fastsr::cpu::avx512_bf16 {

#define FASTSR_LANES 16
#include "cpu/vector.h"
#include "cpu/conv_kernel.h"

struct Pairs {
  static constexpr int kUnit = 2;
  using Operand = __m512bh;
  FASTSR_INLINE Operand weights(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
  FASTSR_INLINE Operand broadcast(const char* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  FASTSR_INLINE Vector multiply_add(Operand x, Operand w, Vector sum) { return _mm512_dpbf16_ps(sum, x, w); }
};

static void copy(const void* from, void* to, int64_t count) { __builtin_memcpy(to, from, count * sizeof(BFloat16)); }

extern const Kernel bfloat16 = {
    "bfloat16 pairs", Element::bf16, LANES, VECTORS, Pairs::kUnit, LANES / 3,
    {nullptr, &rows<Pairs, BFloat16>, nullptr},
    {nullptr, &copy, nullptr}, nullptr,
};

}  // namespace fastsr::cpu::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
