// Tensor maps for copy_box of tma.cuh, made on the host. The driver's encoder is asked of the runtime: the library links no libcuda,
// so that it loads where there is no driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>

#include "cuda/hopper/layout.cuh"
#include "cuda/numeric.cuh"

namespace fastsr::cuda::hopper {

// cuTensorMapEncodeTiled of the driver that runs, which CUDA 12.0 brought.
inline auto tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    STD_TORCH_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess && entry != nullptr,
                    "fastsr: the CUDA driver has no cuTensorMapEncodeTiled; expected one for CUDA 12.0 or newer");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return encoder;
}

// A tensor of DIMS sizes, the fastest first, whose elements along the first lie side by side, read in boxes that lie in shared memory
// without gaps. `strides` are those of the other sizes in elements, of 16 bytes or multiples; `data` is a multiple of 16. With a
// swizzle the box's first size is at most one span long.
template <class T, int DIMS>
CUtensorMap tensor_map(const T* data, const int64_t (&sizes)[DIMS], const int64_t (&strides)[DIMS - 1], const int (&box)[DIMS], Swizzle swizzle) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  constexpr CUtensorMapDataType type = std::is_same_v<T, float>    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                       : std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMapSwizzle mode = swizzle == Swizzle::span128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : swizzle == Swizzle::span64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : swizzle == Swizzle::span32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                               : CU_TENSOR_MAP_SWIZZLE_NONE;
  cuuint64_t extent[DIMS], pitch[DIMS - 1];
  cuuint32_t window[DIMS], step[DIMS];
  for (int i = 0; i < DIMS; ++i) extent[i] = sizes[i], window[i] = box[i], step[i] = 1;
  for (int i = 0; i + 1 < DIMS; ++i) pitch[i] = strides[i] * sizeof(T);
  CUtensorMap map;
  const CUresult error = tensor_map_encoder()(&map, type, DIMS, const_cast<T*>(data), extent, pitch, window, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                              mode, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(error == CUDA_SUCCESS, "fastsr: cuTensorMapEncodeTiled failed with error ", static_cast<int>(error), " for a box of ", box[0],
                  " x ", box[1], " in rows of ", sizes[0], " elements");
  return map;
}

}  // namespace fastsr::cuda::hopper
