// The dtype of an operator's parameters: that of its pictures; or float32 for pictures of 16 bits, as autocast leaves them. Kernels round
// such parameters to the pictures' dtype while they pack or read them, and leave their gradients in float32.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace fastsr {

// True for a parameter that is wider than the pictures.
inline bool is_wide(const torch::stable::Tensor& parameter, const torch::stable::Tensor& x) {
  return parameter.scalar_type() != x.scalar_type();
}

// True if a parameter has one of the two dtypes.
inline bool fits_pictures(const torch::stable::Tensor& parameter, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  return parameter.scalar_type() == x.scalar_type() || parameter.scalar_type() == ScalarType::Float;
}

}  // namespace fastsr
