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

}  // namespace fastsr::cpu
