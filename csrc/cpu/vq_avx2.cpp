// The nearest-code search for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "cpu/unfused.h"
#define FASTSR_TARGET "avx2,fma,f16c"
#include "cpu/target.h"
#include "cpu/vq_engine.h"

namespace fastsr::cpu::avx2 {

#define FASTSR_LANES 8
#define FASTSR_NAME "avx2"
#include "cpu/vector.h"
#include "cpu/vq_kernel.h"

}  // namespace fastsr::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
