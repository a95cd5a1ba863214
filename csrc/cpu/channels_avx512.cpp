// Sums and scalings over channels for AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#define FASTSR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#include "cpu/target.h"
#include "cpu/channels.h"

namespace fastsr::cpu::avx512 {

#define FASTSR_LANES 16
#include "cpu/vector.h"
#include "cpu/channels_kernel.h"

}  // namespace fastsr::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
