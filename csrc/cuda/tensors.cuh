// Torch's tensors as what the kernels take.
#pragma once

#include <limits>
#include <optional>

#include "common/parameters.h"
#include "cuda/launch.cuh"
#include "cuda/parameter.cuh"

namespace fastsr::cuda {

using torch::stable::Tensor;

// run(T()) with the element type of `x`.
template <class Run>
void with_element_type(const Tensor& x, const char* op, Run run) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return run(float());
    case ScalarType::BFloat16: return run(__nv_bfloat16());
    case ScalarType::Half: return run(__half());
    default:
      STD_TORCH_CHECK(false, op, ": ", torch::headeronly::toString(x.scalar_type()),
                      " has no CUDA kernel; expected float32, bfloat16 or float16");
  }
}

template <class T>
T* pointer(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

// A parameter of an operator on pictures like x.
template <class T>
Parameter<T> parameter(const std::optional<Tensor>& t, const Tensor& x) {
  return t ? Parameter<T>{t->const_data_ptr(), is_wide(*t, x)} : Parameter<T>{};
}

inline int checked_int(int64_t value, const char* op, const char* name) {
  STD_TORCH_CHECK(value <= std::numeric_limits<int>::max(), op, ": ", name, " is ", value, "; expected less than 2^31");
  return static_cast<int>(value);
}

}  // namespace fastsr::cuda
