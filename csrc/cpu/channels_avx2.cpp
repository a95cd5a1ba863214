// Sums and scalings over channels for AVX2, FMA and F16C.
#if defined(__x86_64__)
#define FASTSR_TARGET "avx2,fma,f16c"
#include "cpu/target.h"
#include "cpu/channels.h"

namespace fastsr::cpu::avx2 {

#define FASTSR_LANES 8
#include "cpu/vector.h"
#include "cpu/channels_kernel.h"

}  // namespace fastsr::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
