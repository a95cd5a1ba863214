// The 3x3 convolution engine for AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#define FASTSR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw"
#include "cpu/target.h"
#include "cpu/conv_engine.h"

namespace fastsr::cpu::avx512 {

#define FASTSR_LANES 16
#include "cpu/vector.h"
#include "cpu/conv_kernel.h"

extern const Kernel float32 = {
    "float32", Element::f32, LANES, VECTORS, 1, LANES / 3,
    {&rows<Floats, float>, &rows<Floats, BFloat16>, &rows<Floats, Half>},
    {&read<float>, &read<BFloat16>, &read<Half>}, nullptr,
};

}  // namespace fastsr::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
