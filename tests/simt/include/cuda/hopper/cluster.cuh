// Host twin of csrc/cuda/hopper/cluster.cuh: the blocks' turns are in cluster.h.
#pragma once

#include "cuda/copy.cuh"

#define FASTSR_CLUSTERS 1

namespace fastsr::cuda::hopper {

constexpr int kClusterBlocks = 8;

inline uint32_t cluster_rank() { return static_cast<uint32_t>(simt::running->rank()); }
inline void cluster_sync() { simt::running->cluster_barrier(); }
inline float load_of_block(const float* shared, uint32_t rank) {
  simt::running->give_way();
  return *static_cast<const float*>(simt::running->in_block(static_cast<int>(rank), shared, sizeof(float)));
}

}  // namespace fastsr::cuda::hopper
