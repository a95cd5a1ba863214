// Weight gradients of 3x3 convolutions for AVX2, FMA and F16C.
#if defined(__x86_64__)
#define FASTSR_TARGET "avx2,fma,f16c"
#include "cpu/target.h"
#include "cpu/wgrad_engine.h"

namespace fastsr::cpu::avx2 {

#define FASTSR_LANES 8
#include "cpu/vector.h"
#include "cpu/wgrad_kernel.h"

extern const WeightGradientKernel weight_gradient = {
    "float32", kMaxChannels, kMaxOutputs, BLOCK, &scratch_bytes<Floats>,
    {&run_task<Floats, float>, &run_task<Floats, BFloat16>, &run_task<Floats, Half>},
};

}  // namespace fastsr::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
