// Products of a warpgroup, four warps of which the first has a number divisible by four, on tensor cores (sm_90a). PTX ISA 8.7, 9.7.15.
//
// One product adds A(64 x K) B(K x N) to float32 sums in the registers of 128 threads (fragment_row and fragment_column of layout.cuh);
// A and B lie in shared memory, with the K values of a row of A and a column of B side by side, and K takes 32 bytes: 16 float16 or
// bfloat16, 8 float32 whose low bits are cut off to tf32. Products run on while the warps do something else:
//
//     fence()                  the sums' registers, and shared memory behind fence_async_proxy, are in order for what follows
//     multiply(...) ...        in order among themselves, on the same sums too
//     commit()                 a group of them is under way
//     wait<PENDING>(sums)      all but the latest PENDING groups have ended, and the sums can be read
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/hopper/layout.cuh"

namespace fastsr::cuda::hopper {

// 9.7.15.7.1, wgmma.fence.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// 9.7.15.7.2, wgmma.commit_group.
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// 9.7.15.7.3, wgmma.wait_group: what the ended groups read may be overwritten.
template <int PENDING>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The same, and the sums may be read; named, so that the compiler reads none of them before.
template <int PENDING, int COUNT>
__device__ __forceinline__ void wait(float (&sums)[COUNT]) {
  wait<PENDING>();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define FASTSR_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
// %0 .. and d[0] .. of the shapes below.
#define FASTSR_T48 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FASTSR_D48 FASTSR_D8(0), FASTSR_D8(8), FASTSR_D8(16)
#define FASTSR_T64 FASTSR_T48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTSR_D64 FASTSR_D48, FASTSR_D8(24)
#define FASTSR_T96 FASTSR_T64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTSR_D96 FASTSR_D64, FASTSR_D8(32), FASTSR_D8(40)
#define FASTSR_T128 FASTSR_T96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTSR_D128 FASTSR_D96, FASTSR_D8(48), FASTSR_D8(56)
#define FASTSR_T144 FASTSR_T128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FASTSR_D144 FASTSR_D128, FASTSR_D8(64)
#define FASTSR_T192 FASTSR_T144 ", %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87" ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTSR_D192 FASTSR_D144, FASTSR_D8(72), FASTSR_D8(80), FASTSR_D8(88)
#define FASTSR_T256 FASTSR_T192 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTSR_D256 FASTSR_D192, FASTSR_D8(96), FASTSR_D8(104), FASTSR_D8(112), FASTSR_D8(120)

// d = a * b, or with `add` d += a * b; a and b are matrix descriptors. T = __half or __nv_bfloat16: m64nNk16; float: m64nNk8 of tf32.
// 9.7.15.5.2, wgmma.mma_async.
template <class T, int N>
__device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
// shape: of N; x, y, z: the numbers of the operands behind the sums; end: the 16-bit types' "neither operand is transposed"
#define FASTSR_WGMMA(n, k_and_types, x, y, z, end)                                                                                      \
  asm volatile("{\n .reg .pred add;\n setp.ne.b32 add, %" z ", 0;\n wgmma.mma_async.sync.aligned.m64n" #n k_and_types " {" FASTSR_T##n \
               "}, %" x ", %" y ", add, 1, 1" end ";\n}"                                                                               \
               : FASTSR_D##n                                                                                                            \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define FASTSR_WGMMA_TYPES(n, x, y, z)                                    \
  if constexpr (std::is_same_v<T, __half>) {                              \
    FASTSR_WGMMA(n, "k16.f32.f16.f16", x, y, z, ", 0, 0");                \
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {                \
    FASTSR_WGMMA(n, "k16.f32.bf16.bf16", x, y, z, ", 0, 0");              \
  } else {                                                                \
    static_assert(std::is_same_v<T, float>);                              \
    FASTSR_WGMMA(n, "k8.f32.tf32.tf32", x, y, z, "");                     \
  }
  if constexpr (N == 48) {
    FASTSR_WGMMA_TYPES(48, "24", "25", "26")
  } else if constexpr (N == 64) {
    FASTSR_WGMMA_TYPES(64, "32", "33", "34")
  } else if constexpr (N == 96) {
    FASTSR_WGMMA_TYPES(96, "48", "49", "50")
  } else if constexpr (N == 128) {
    FASTSR_WGMMA_TYPES(128, "64", "65", "66")
  } else if constexpr (N == 144) {
    FASTSR_WGMMA_TYPES(144, "72", "73", "74")
  } else if constexpr (N == 192) {
    FASTSR_WGMMA_TYPES(192, "96", "97", "98")
  } else {
    static_assert(N == 256);
    FASTSR_WGMMA_TYPES(256, "128", "129", "130")
  }
#undef FASTSR_WGMMA_TYPES
#undef FASTSR_WGMMA
}
#undef FASTSR_D8
#undef FASTSR_T48
#undef FASTSR_D48
#undef FASTSR_T64
#undef FASTSR_D64
#undef FASTSR_T96
#undef FASTSR_D96
#undef FASTSR_T128
#undef FASTSR_D128
#undef FASTSR_T144
#undef FASTSR_D144
#undef FASTSR_T192
#undef FASTSR_D192
#undef FASTSR_T256
#undef FASTSR_D256

}  // namespace fastsr::cuda::hopper
