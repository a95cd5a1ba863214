// Warp-wide matrix products on tensor cores: ldmatrix and mma.sync (sm_80 and later).
//
// One mma computes D(16 x 8) += A(16 x K) * B(K x 8) in float32, K = 16 for bf16 and f16, 8 for tf32: 32 bytes of a row.
// With g = lane / 4 and q = lane % 4 a lane holds, each 32-bit register being 4 bytes side by side along K:
//
//     A   a[0] row g,   bytes 4q..      a[2] row g,   bytes 16 + 4q..
//         a[1] row g+8, bytes 4q..      a[3] row g+8, bytes 16 + 4q..
//     B   b0   column g, bytes 4q..     b1   column g, bytes 16 + 4q..      (a column's K values side by side)
//     D   d[0], d[1]  row g, columns 2q, 2q+1      d[2], d[3]  row g+8, columns 2q, 2q+1
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/copy.cuh"

namespace fastsr::cuda {

// Loads COUNT (1, 2 or 4) matrices of 8 rows of 16 bytes; lane 8 i + r names row r of matrix i, a multiple of 16 in shared memory.
// registers[i] is then the 4 bytes at byte 4q of row g of matrix i; TRANSPOSED: the elements (2q, g) and (2q + 1, g) of 16-bit types.
template <int COUNT, bool TRANSPOSED = false>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[COUNT], const void* row) {
  static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4);
  const uint32_t address = shared_address(row);
  if constexpr (COUNT == 1 && !TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(registers[0]) : "r"(address) : "memory");
  } else if constexpr (COUNT == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(registers[0]) : "r"(address) : "memory");
  } else if constexpr (COUNT == 2 && !TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1]) : "r"(address) : "memory");
  } else if constexpr (COUNT == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1]) : "r"(address) : "memory");
  } else if constexpr (!TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3]) : "r"(address) : "memory");
  }
}

// Rounds float32 values to tf32 (nearest, ties away from zero); mma would cut their low bits off, which biases every product.
template <int COUNT>
__device__ __forceinline__ void round_to_tf32(uint32_t (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(registers[i]) : "f"(__uint_as_float(registers[i])));
}

// d += a * b. T = __nv_bfloat16 or __half: m16n8k16; T = float: m16n8k8 of values that were rounded to tf32.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define FASTSR_MMA(shape_and_types)                                                                            \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    FASTSR_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<T, __half>) {
    FASTSR_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<T, float>);
    FASTSR_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef FASTSR_MMA
}

}  // namespace fastsr::cuda
