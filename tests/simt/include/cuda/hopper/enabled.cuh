// Host twin of csrc/cuda/hopper/enabled.cuh.
#pragma once

#define FASTSR_SM90A 1

namespace fastsr::cuda::hopper {

inline void not_for_this_gpu() { simt::fail("a kernel for sm_90a was launched elsewhere"); }

}  // namespace fastsr::cuda::hopper
