// Weight gradients of 3x3 convolutions for AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#define FASTSR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#include "cpu/target.h"
#include "cpu/wgrad_engine.h"

namespace fastsr::cpu::avx512 {

#define FASTSR_LANES 16
#include "cpu/vector.h"
#include "cpu/wgrad_kernel.h"

extern const WeightGradientKernel weight_gradient = {
    "float32", kMaxChannels, kMaxOutputs, BLOCK, &scratch_bytes<Floats>,
    {&run_task<Floats, float>, &run_task<Floats, BFloat16>, &run_task<Floats, Half>},
};

}  // namespace fastsr::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
