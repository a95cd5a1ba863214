// Whether the kernels that only Hopper can run are used. None has run on hardware yet, so the environment has to ask for them.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <string_view>

// In a kernel for sm_90a (wgmma, setmaxnreg): its body is compiled where this is 1, and is `not_for_this_gpu()` elsewhere.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTSR_SM90A 1
#else
#define FASTSR_SM90A 0
#endif

namespace fastsr::cuda::hopper {

// FASTSR_HOPPER=1 (read at each call), a device of compute capability 9.0, and machine code for sm_90a in this library.
inline bool enabled(int device) {
  const char* wanted = std::getenv("FASTSR_HOPPER");
  if (wanted == nullptr || std::string_view(wanted) != "1") return false;
#if defined(FASTSR_CUDA_ARCHS)
  constexpr bool built = std::string_view(FASTSR_CUDA_ARCHS).find("sm_90a") != std::string_view::npos;
#else
  constexpr bool built = false;
#endif
  int major = 0, minor = 0;
  return built && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 && minor == 0;
}

// The whole of an sm_90a kernel on other architectures, which never launch it. The comment in the PTX tells the resource ledger.
__device__ __forceinline__ void not_for_this_gpu() { asm volatile("// runs on sm_90a alone\n trap;"); }

}  // namespace fastsr::cuda::hopper
