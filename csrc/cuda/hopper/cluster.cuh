// Clusters: neighbouring blocks that run at the same time on one group of multiprocessors and read each other's shared memory
// (sm_90 and later; Launcher::clustered starts them). PTX ISA 8.7.
#pragma once

#include "cuda/copy.cuh"

// A kernel that needs clusters and a block's 227 KB has its body where this is 1; sm_120 has clusters, but only 99 KB.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
#define FASTSR_CLUSTERS 1
#else
#define FASTSR_CLUSTERS 0
#endif

namespace fastsr::cuda::hopper {

constexpr int kClusterBlocks = 8;  // the most that every GPU with clusters grants

// This block's number in its cluster: %cluster_ctarank.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of all blocks of the cluster; what they wrote before can be read after: barrier.cluster, a release and an acquire.
// A block whose memory others read must not end before they have: they all meet once more.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}

// The value at the place of `shared` in block `rank`: mapa turns this block's address into the other's, ld.shared::cluster reads there.
__device__ __forceinline__ float load_of_block(const float* shared, uint32_t rank) {
  float value;
  asm volatile("{\n .reg .u32 there;\n mapa.shared::cluster.u32 there, %1, %2;\n ld.shared::cluster.f32 %0, [there];\n}"
               : "=f"(value)
               : "r"(shared_address(shared)), "r"(rank)
               : "memory");
  return value;
}

}  // namespace fastsr::cuda::hopper
