// The arguments of the code search's operators as plain numbers, checked once for the CPU and the CUDA kernels.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace fastsr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x (outer, heads, channels, inner), codebook (heads, codes, channels) without gaps.
struct VqShape {
  int64_t outer, heads, channels, inner, codes;
};

inline VqShape vq_shape(const Tensor& x, const Tensor& codebook, const char* op) {
  STD_TORCH_CHECK(x.dim() == 4 && codebook.dim() == 3 && x.numel() > 0 && codebook.numel() > 0, op,
                  ": x has ", x.dim(), " and codebook ", codebook.dim(), " dimensions; expected x (outer, heads, D, inner) and codebook (heads, K, D), none of them empty");
  const VqShape s{x.size(0), x.size(1), x.size(2), x.size(3), codebook.size(1)};
  STD_TORCH_CHECK(codebook.size(0) == s.heads && codebook.size(2) == s.channels && codebook.is_contiguous() &&
                      codebook.scalar_type() == x.scalar_type(),
                  op, ": codebook has shape (", codebook.size(0), ", ", codebook.size(1), ", ", codebook.size(2), "); expected a contiguous (", s.heads,
                  ", K, ", s.channels, ") of x's dtype");
  return s;
}

// A contiguous tensor (outer, heads, inner), as there is one value of it for each row.
inline void check_per_row(const std::optional<Tensor>& t, const VqShape& s, ScalarType type, const char* op, const char* name) {
  STD_TORCH_CHECK(!t || (t->dim() == 3 && t->size(0) == s.outer && t->size(1) == s.heads && t->size(2) == s.inner && t->is_contiguous() &&
                         t->scalar_type() == type),
                  op, ": ", name, " does not fit; expected a contiguous (", s.outer, ", ", s.heads, ", ", s.inner, ") of ", torch::headeronly::toString(type));
}

inline void check_like(const std::optional<Tensor>& t, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(!t || (t->dim() == 4 && t->size(0) == x.size(0) && t->size(1) == x.size(1) && t->size(2) == x.size(2) && t->size(3) == x.size(3) &&
                         t->scalar_type() == x.scalar_type()),
                  op, ": ", name, " does not fit; expected x's shape and dtype");
}

// A statistic without gaps.
inline void check_statistic(const Tensor& t, int64_t elements, ScalarType type, const char* op, const char* name) {
  STD_TORCH_CHECK(t.numel() == elements && t.is_contiguous() && t.scalar_type() == type, op, ": ", name, " has ", t.numel(),
                  " elements; expected ", elements, " of ", torch::headeronly::toString(type), ", contiguous");
}

// The outputs of fastsr::vector_quantize; the shape of its inputs.
inline VqShape vector_quantize_shape(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& mask, const Tensor& quantized,
                                     const Tensor& indices, const Tensor& loss, const Tensor& counts, const Tensor& sums,
                                     const std::optional<Tensor>& distances) {
  const char* op = "vector_quantize";
  const VqShape s = vq_shape(x, codebook, op);
  check_like(quantized, x, op, "quantized");
  check_per_row(indices, s, ScalarType::Long, op, "indices");
  check_per_row(distances, s, ScalarType::Float, op, "distances");
  check_per_row(mask, s, ScalarType::Bool, op, "mask");
  check_statistic(loss, 1, ScalarType::Float, op, "loss");
  check_statistic(counts, s.heads * s.codes, ScalarType::Long, op, "counts");
  check_statistic(sums, s.heads * s.codes * s.channels, ScalarType::Float, op, "sums");
  return s;
}

}  // namespace fastsr
