// The arguments of the residual channel attention block's operators, checked once for the CPU and the CUDA kernels.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "common/parameters.h"

namespace fastsr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct RcabShape {
  int64_t batch, features, hidden, height, width;
  int64_t pixels() const { return height * width; }
};

inline void check_rcab_pixels(const Tensor& t, const Tensor& x, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == x.size(0) && t.size(1) == channels && t.size(2) == x.size(2) && t.size(3) == x.size(3) &&
                      t.scalar_type() == x.scalar_type(),
                  "rcab: ", name, " does not fit; expected ", channels, " channels, and images and dtype as the others");
  STD_TORCH_CHECK(channels <= 1 || t.stride(1) == 1, "rcab: ", name, " has channel stride ", t.stride(1),
                  "; expected 1 (channels-last, or a channel slice of it)");
}

inline void check_rcab_floats(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == count, "rcab: ", name, " is not ", count,
                  " contiguous values of float32");
}

inline void check_rcab_bias(const std::optional<Tensor>& bias, const Tensor& weight, const char* name) {
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == weight.scalar_type()), "rcab: ",
                  name, " has not one value of the weight's dtype per output");
}

// x, the two convolutions, the hidden channels r, and the vectors that go with them: `sums` (N, M, 9), the sum of r that each tap of the
// second convolution reads, and `attention` (2, N, F), the pooled values and the gate.
inline RcabShape rcab_shape(const Tensor& x, const Tensor& weight1, const Tensor& weight2, const Tensor& hidden, const Tensor& sums,
                            const Tensor& attention) {
  STD_TORCH_CHECK(x.dim() == 4, "rcab: x has ", x.dim(), " dimensions; expected 4");
  STD_TORCH_CHECK(weight1.dim() == 4, "rcab: weight1 has ", weight1.dim(), " dimensions; expected 4");
  const RcabShape s{x.size(0), x.size(1), weight1.size(0), x.size(2), x.size(3)};
  const auto fits = [&](const Tensor& w, int64_t outputs, int64_t inputs) {
    return w.dim() == 4 && w.size(0) == outputs && w.size(1) == inputs && w.size(2) == 3 && w.size(3) == 3 && fits_pictures(w, x) &&
           w.scalar_type() == weight1.scalar_type();
  };
  STD_TORCH_CHECK(fits(weight1, s.hidden, s.features) && fits(weight2, s.features, s.hidden),
                  "rcab: the weights do not fit x with ", s.features, " channels; expected (M, F, 3, 3) and (F, M, 3, 3) of its dtype or both float32");
  check_rcab_pixels(x, x, s.features, "x");
  check_rcab_pixels(hidden, x, s.hidden, "hidden");
  check_rcab_floats(sums, s.batch * s.hidden * 9, "sums");
  check_rcab_floats(attention, 2 * s.batch * s.features, "attention");
  return s;
}

// Rows of weight2 lie end to end, each as [channel][tap] or, in a channels-last weight, as [tap][channel].
inline void check_rcab_dense(const Tensor& weight2, const std::optional<Tensor>& bias2) {
  const int64_t m = weight2.size(1);
  const bool channels_last = weight2.stride(0) == 9 * m && weight2.stride(1) == 1 && weight2.stride(2) == 3 * m && weight2.stride(3) == m;
  STD_TORCH_CHECK(weight2.is_contiguous() || channels_last, "rcab: weight2 is neither contiguous nor channels-last");
  STD_TORCH_CHECK(!bias2 || bias2->is_contiguous(), "rcab: bias2 is not contiguous");
}

inline void check_rcab_backward(const Tensor& x, const RcabShape& s, const Tensor& weight2, const std::optional<Tensor>& bias2,
                                const Tensor& grad_hidden, const std::optional<Tensor>& dx, const std::vector<Tensor>& gradients) {
  check_rcab_pixels(grad_hidden, x, s.hidden, "grad_hidden");
  if (dx) check_rcab_pixels(*dx, x, s.features, "dx");
  check_rcab_bias(bias2, weight2, "bias2");
  STD_TORCH_CHECK(weight2.is_contiguous() && (!bias2 || bias2->is_contiguous()), "rcab: weight2 or bias2 is not contiguous");
  STD_TORCH_CHECK(gradients.empty() || gradients.size() == 8, "rcab: ", gradients.size(), " gradients; expected none or 8");
  for (const Tensor& t : gradients) {
    STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == weight2.scalar_type(), "rcab: a gradient is not contiguous, of the parameters' dtype");
  }
}

}  // namespace fastsr
