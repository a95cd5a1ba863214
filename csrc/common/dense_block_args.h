// The arguments of the dense block's operators as plain numbers, checked once for the CPU and the CUDA kernels.
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

// Channels of a block: convolution k reads the workspace's first begin[k] channels and writes outputs[k] from there on.
struct DenseBlockShape {
  int64_t batch, height, width;
  int64_t channels;               // of the workspace
  std::vector<int64_t> begin;     // begin[0] is the number of features
  std::vector<int64_t> outputs;
  int64_t convs() const { return static_cast<int64_t>(outputs.size()); }
};

inline void check_pixel_major(const Tensor& t, const Tensor& like, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == like.size(0) && t.size(1) == channels && t.size(2) == like.size(2) &&
                      t.size(3) == like.size(3) && t.scalar_type() == like.scalar_type(),
                  "dense_block: ", name, " does not fit; expected ", channels, " channels, and images and dtype as the others");
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, "dense_block: ", name, " has channel stride ", t.stride(1),
                  "; expected 1 (channels-last, or a channel slice of it)");
}

// `closed`: the last convolution returns to the number of features; its outputs are not part of the workspace.
// `like`: x or the workspace.
inline DenseBlockShape dense_block_shape(const Tensor& like, const std::vector<Tensor>& weights, int64_t features, bool closed) {
  STD_TORCH_CHECK(like.dim() == 4, "dense_block: x has ", like.dim(), " dimensions; expected 4");
  DenseBlockShape s{like.size(0), like.size(2), like.size(3), features, {}, {}};
  for (size_t k = 0; k < weights.size(); ++k) {
    const Tensor& w = weights[k];
    STD_TORCH_CHECK(w.dim() == 4 && w.size(1) == s.channels && w.size(2) == 3 && w.size(3) == 3 && fits_pictures(w, like) &&
                        w.scalar_type() == weights[0].scalar_type(),
                    "dense_block: weight ", k, " does not fit; expected (outputs, ", s.channels, ", 3, 3) of x's dtype or all float32");
    s.begin.push_back(s.channels);
    s.outputs.push_back(w.size(0));
    if (!closed || k + 1 < weights.size()) s.channels += w.size(0);
  }
  STD_TORCH_CHECK(!closed || (!weights.empty() && s.outputs.back() == features), "dense_block: the last weight must have ", features, " outputs");
  return s;
}

inline void check_biases(const std::vector<std::optional<Tensor>>& biases, const DenseBlockShape& s, const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(static_cast<int64_t>(biases.size()) == s.convs(), "dense_block: ", biases.size(), " biases for ", s.convs(), " weights");
  for (int64_t k = 0; k < s.convs(); ++k) {
    STD_TORCH_CHECK(!biases[k] || (biases[k]->dim() == 1 && biases[k]->size(0) == s.outputs[k] && biases[k]->scalar_type() == weights[k].scalar_type()),
                    "dense_block: bias ", k, " has not one value of its weight's dtype per output");
  }
}

}  // namespace fastsr
