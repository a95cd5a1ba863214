// The certified nearest-code search that fastsr::vq_nearest and fastsr::vector_quantize share.
#pragma once
#include <cstdint>
#include <optional>

#include "common/vq_args.h"
#include "cpu/vq_engine.h"

namespace fastsr::cpu {

// x (outer, heads, channels, inner) with strides in elements, codes (heads, codes, channels) without gaps.
struct VqProblem {
  const void* x;
  const void* codebook;
  Element type;
  int64_t outer, heads, channels, inner, codes;
  int64_t x_outer, x_head, x_channel, x_inner;
  bool cosine;
  int64_t* indices;    // (outer, heads, inner)
  float* distances;    // the same, or null
  int64_t* rescored;   // two counters to add to, or null

  int64_t rows() const { return outer * inner; }  // of a head
  // Row r of a head: its first channel in x, and its place in indices and distances.
  int64_t x_at(int64_t head, int64_t r) const {
    return head * x_head + (inner == 1 ? r * x_outer : r / inner * x_outer + r % inner * x_inner);  // divisions are slow
  }
  int64_t at(int64_t head, int64_t r) const { return inner == 1 ? r * heads + head : (r / inner * heads + head) * inner + r % inner; }
};

// The problem of checked tensors; `distances` may be missing.
VqProblem vq_problem(const Tensor& x, const Tensor& codebook, const VqShape& shape, bool cosine, const Tensor& indices,
                     const std::optional<Tensor>& distances, const char* op);

// Fill indices and distances on torch's threads.
void nearest_codes(const VqProblem& problem);

}  // namespace fastsr::cpu
