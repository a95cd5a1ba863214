// Channel attention's kernels for AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#define FASTSR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#include "cpu/target.h"
#include "cpu/attention_engine.h"

namespace fastsr::cpu::avx512 {

#define FASTSR_LANES 16
#include "cpu/vector.h"
#include "cpu/attention_kernel.h"

extern const AttentionKernel attention = {
    LANES,
    {&sum<float>, &sum<BFloat16>, &sum<Half>},
    {&scale<float>, &scale<BFloat16>, &scale<Half>},
    {&multiply<float>, &multiply<BFloat16>, &multiply<Half>},
    {&multiply_transposed<float>, &multiply_transposed<BFloat16>, &multiply_transposed<Half>},
    {&outer<float>, &outer<BFloat16>, &outer<Half>},
};

}  // namespace fastsr::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
