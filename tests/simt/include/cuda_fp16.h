// float16 as the host compiler's own type.
#pragma once

#include "simt.h"

struct __half {
  uint16_t bits;
};

#if defined(__aarch64__)
using HostHalf = __fp16;  // g++ 12 has _Float16 in C++ on x86 only
#else
using HostHalf = _Float16;
#endif

inline float __half2float(__half v) { return static_cast<float>(std::bit_cast<HostHalf>(v.bits)); }
inline __half __float2half_rn(float v) { return {std::bit_cast<uint16_t>(static_cast<HostHalf>(v))}; }
