// Weights packed once for inference: a byte tensor with a header that names the kernel's layout, and the packed convolutions.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/conv_driver.h"

namespace fastsr::cpu {

using Sizes = std::vector<std::pair<int64_t, int64_t>>;  // output and input channels of each convolution

// Where the packed convolutions begin, or null if `frozen` is absent or was packed for another kernel, dtype or shape:
// then the weights are packed in the call, as without it.
char* frozen_weights(const std::optional<torch::stable::Tensor>& frozen, const Kernel& kernel, Element type, const Sizes& sizes,
                     int64_t pixel_shuffle);

// The packed convolutions of one call: those that were frozen, or memory for them that each calling thread keeps.
class PackedConvs {
 public:
  PackedConvs(const Kernel& kernel, Element type, const Sizes& sizes, const std::optional<torch::stable::Tensor>& frozen = std::nullopt);
  // The next one, in the order of `sizes`; of the second form with its weights.
  PackedConv take(int64_t cout, int64_t cin);
  PackedConv take(const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bias);

 private:
  const Kernel& kernel_;
  Element type_;
  char* next_;
  bool filled_;
};

}  // namespace fastsr::cpu
