// Copies that the tensor memory accelerator makes into shared memory, started by one thread, counted by a barrier (sm_90).
// PTX ISA 8.7, 9.7.9.25: a copy's bytes are announced with Barrier::arrive_expecting.
#pragma once

#include <cuda.h>

#include "cuda/hopper/mbarrier.cuh"

namespace fastsr::cuda::hopper {

// `bytes`, both addresses and so the end are multiples of 16. 9.7.9.25.4.1, cp.async.bulk.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

// Brings a map (a __grid_constant__ parameter) into the cache of descriptors. 9.7.9.15, prefetch.tensormap.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The map's box from element (at[0], at[1], ...) on, the fastest size first; what lies outside of the tensor becomes zero, and counts
// among the bytes too. 9.7.9.25.5.2, cp.async.bulk.tensor.
template <int DIMS>
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap& map, const int (&at)[DIMS], Barrier& barrier) {
  static_assert(2 <= DIMS && DIMS <= 5);
#define FASTSR_COPY_BOX(dims, coordinates, barrier_number, ...)                                                                              \
  asm volatile("cp.async.bulk.tensor." dims ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {" coordinates "}], [%"  \
               barrier_number "];" ::"r"(shared_address(shared)),                                                                            \
               "l"(&map), __VA_ARGS__, "r"(shared_address(&barrier))                                                                         \
               : "memory")
  if constexpr (DIMS == 2) {
    FASTSR_COPY_BOX("2d", "%2, %3", "4", "r"(at[0]), "r"(at[1]));
  } else if constexpr (DIMS == 3) {
    FASTSR_COPY_BOX("3d", "%2, %3, %4", "5", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  } else if constexpr (DIMS == 4) {
    FASTSR_COPY_BOX("4d", "%2, %3, %4, %5", "6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  } else {
    FASTSR_COPY_BOX("5d", "%2, %3, %4, %5, %6", "7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
  }
#undef FASTSR_COPY_BOX
}

// To the same place in each block of the cluster whose bit is set in `blocks`, and to the barrier there. 9.7.9.25.4.1.
__device__ __forceinline__ void copy_bulk_to_all(void* shared, const void* global, uint32_t bytes, Barrier& barrier, uint16_t blocks) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(&barrier)), "h"(blocks)
               : "memory");
}

}  // namespace fastsr::cuda::hopper
