// Element types and 16-byte packs of them; all arithmetic is float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastsr::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// COUNT elements that are loaded and stored by one instruction: the address must be a multiple of their size.
template <class T, int COUNT = 16 / sizeof(T)>
struct alignas(COUNT * sizeof(T)) Pack {
  T v[COUNT];
};

// An integer type of so many bytes.
template <int BYTES>
struct WordOf;
template <>
struct WordOf<2> { using type = unsigned short; };
template <>
struct WordOf<4> { using type = unsigned; };
template <>
struct WordOf<8> { using type = uint2; };
template <>
struct WordOf<16> { using type = uint4; };

// Packs that nobody needs again soon: the L2 cache gives up their lines before others.
template <class P>
__device__ __forceinline__ P load_once(const P* p) {
  return __builtin_bit_cast(P, __ldcs(reinterpret_cast<const typename WordOf<sizeof(P)>::type*>(p)));
}
template <class P>
__device__ __forceinline__ void store_once(P* p, const P& pack) {
  using Word = typename WordOf<sizeof(P)>::type;
  __stcs(reinterpret_cast<Word*>(p), __builtin_bit_cast(Word, pack));
}

}  // namespace fastsr::cuda
