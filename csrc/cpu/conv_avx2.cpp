// The 3x3 convolution engine for AVX2, FMA and F16C.
#if defined(__x86_64__)
#define FASTSR_TARGET "avx2,fma,f16c"
#include "cpu/target.h"
#include "cpu/conv_engine.h"

namespace fastsr::cpu::avx2 {

#define FASTSR_LANES 8
#include "cpu/vector.h"
#include "cpu/conv_kernel.h"

extern const Kernel float32 = {
    "float32", Element::f32, LANES, VECTORS, 1, LANES / 3,
    {&rows<Floats, float>, &rows<Floats, BFloat16>, &rows<Floats, Half>},
    {&read<float>, &read<BFloat16>, &read<Half>}, nullptr,
};

}  // namespace fastsr::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
