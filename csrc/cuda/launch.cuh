// Host side of every kernel launch: device guard, torch's current stream, launch limits and errors, scratch memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "cuda/hopper/enabled.cuh"

// In libtorch_cuda, which a CPU build of torch lacks: weak, so that the library loads there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastsr::cuda {

// Launches kernels on the device of `tensor`, in the stream that is torch's current one now. Never kept between calls.
class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()), device_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "fastsr: this build of torch has no CUDA streams; expected a CUDA build");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    // The library's own (static) CUDA runtime keeps a current device beside that of torch's runtime.
    check(cudaSetDevice(tensor.get_device_index()), "cudaSetDevice");
  }

  // Whether kernels for sm_90a are to be used here.
  bool hopper() const { return hopper::enabled(device_); }

  int multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_), "cudaDeviceGetAttribute");
    return count;
  }

  // `blocks` lie on grid axis x, the only one that holds 2^31 - 1 of them; none is no launch at all (an empty tensor).
  template <class... Parameters>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                  std::type_identity_t<Parameters>... arguments) const {
    if (blocks == 0) return;
    const void* entry = prepared(reinterpret_cast<const void*>(kernel), blocks, shared_bytes);
    void* pointers[] = {&arguments...};
    check(cudaLaunchKernel(entry, dim3(static_cast<unsigned>(blocks)), dim3(threads), pointers, shared_bytes, stream_), "cudaLaunchKernel");
  }

  // The same in clusters of `cluster` blocks, whose numbers follow each other (sm_90).
  template <class... Parameters>
  void clustered(int cluster, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                 std::type_identity_t<Parameters>... arguments) const {
    if (blocks == 0) return;
    const void* entry = prepared(reinterpret_cast<const void*>(kernel), blocks, shared_bytes);
    void* pointers[] = {&arguments...};
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes, config.stream = stream_, config.attrs = &attribute, config.numAttrs = 1;
    check(cudaLaunchKernelExC(&config, entry, pointers), "cudaLaunchKernelExC");
  }

 private:
  // The kernel, allowed so much shared memory; the number of blocks is checked.
  static const void* prepared(const void* entry, int64_t blocks, int shared_bytes) {
    STD_TORCH_CHECK(blocks > 0 && blocks <= std::numeric_limits<int32_t>::max(), "fastsr: a kernel needs ", blocks,
                    " blocks; expected fewer than 2^31");
    if (shared_bytes > 48 * 1024) {
      check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "cudaFuncSetAttribute");
    }
    return entry;
  }

  static void check(cudaError_t error, const char* call) {
    STD_TORCH_CHECK(error == cudaSuccess, "fastsr: ", call, " failed: ", cudaGetErrorString(error));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
  cudaStream_t stream_ = nullptr;
};

// Memory from torch's allocator on the current stream: safe across streams and under graph capture. Freed when the operator
// returns; the allocator hands it only to later work of the same stream.
class Scratch {
 public:
  explicit Scratch(const torch::stable::Tensor& like) : like_(like) {}
  void* operator()(int64_t bytes) const {
    return tensors_.emplace_back(torch::stable::new_empty(like_, {bytes}, torch::headeronly::ScalarType::Byte)).mutable_data_ptr();
  }

 private:
  const torch::stable::Tensor& like_;
  mutable std::vector<torch::stable::Tensor> tensors_;
};

}  // namespace fastsr::cuda
