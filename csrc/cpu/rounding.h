// Parameters that are wider than an operator's pictures, rounded to their dtype: vectors and small matrices that several parts read.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "cpu/conv_engine.h"

namespace fastsr::cpu {

// `value` as an element of this type holds it.
float rounded(float value, Element type);

// The values of a dense tensor as this dtype has them, in memory's order: its own, or those of a copy that lives as long as `kept`.
const void* values_as(torch::headeronly::ScalarType type, const std::optional<torch::stable::Tensor>& t, std::vector<torch::stable::Tensor>& kept);

}  // namespace fastsr::cpu
