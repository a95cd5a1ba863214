// fastsr::vq_nearest on NVIDIA GPUs of compute capability 8.0 and higher; vq_nearest.cuh tells how.
#include <torch/csrc/stable/library.h>

#include "cuda/vq_tensors.cuh"

namespace fastsr::cuda {
namespace {

void vq_nearest(Tensor x, Tensor codebook, bool cosine, Tensor indices, std::optional<Tensor> distances, std::optional<Tensor> rescored) {
  const char* op = "vq_nearest";
  const VqShape s = vq_shape(x, codebook, op);
  check_per_row(indices, s, ScalarType::Long, op, "indices");
  check_per_row(distances, s, ScalarType::Float, op, "distances");
  STD_TORCH_CHECK(!rescored || (rescored->numel() == 2 && rescored->is_contiguous() && rescored->scalar_type() == ScalarType::Long), op,
                  ": rescored has ", rescored->numel(), " elements; expected 2 of int64");
  const Launcher launch(x);
  const Scratch allocate(x);
  with_element_type(x, op, [&]<class T>(T) {
    find_nearest(nearest_call<T>(x, codebook, s, cosine, indices, distances, rescored, op), launch, allocate, s.channels >= kTensorDepth);
  });
}

}  // namespace

// Vector quantisation searches with the same kernels.
template void find_nearest(const NearestCall<float>&, const Launcher&, const Scratch&, bool);
template void find_nearest(const NearestCall<__half>&, const Launcher&, const Scratch&, bool);
template void find_nearest(const NearestCall<__nv_bfloat16>&, const Launcher&, const Scratch&, bool);

STABLE_TORCH_LIBRARY_IMPL(fastsr, CUDA, m) { m.impl("vq_nearest", TORCH_BOX(&vq_nearest)); }

}  // namespace fastsr::cuda
