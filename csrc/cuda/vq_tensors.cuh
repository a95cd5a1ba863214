// Torch's tensors as the views that the kernels of the code search and of vector quantisation read.
#pragma once

#include <limits>

#include "common/vq_args.h"
#include "cuda/tensors.cuh"
#include "cuda/vq_nearest.cuh"

namespace fastsr::cuda {

// Four values of T are loaded at once where they lie side by side at multiples of their size.
template <class T>
bool fours(const void* data, int64_t depth, int64_t depth_stride, std::initializer_list<int64_t> strides) {
  bool all = reinterpret_cast<uintptr_t>(data) % (4 * sizeof(T)) == 0 && depth % 4 == 0 && depth_stride == 1;
  for (const int64_t stride : strides) all = all && stride % 4 == 0;
  return all;
}

template <class T>
RowView<T> row_view(const Tensor& x) {
  const auto* data = static_cast<const T*>(x.const_data_ptr());
  const bool vectors = fours<T>(data, x.size(2), x.stride(2), {x.stride(0), x.stride(1), x.stride(3)});
  return {data, x.size(3), x.stride(0), x.stride(1), x.stride(2), x.stride(3), vectors};
}

// The search's arguments; everything was checked by vq_shape and check_per_row.
template <class T>
NearestCall<T> nearest_call(const Tensor& x, const Tensor& codebook, const VqShape& s, bool cosine, const Tensor& indices,
                            const std::optional<Tensor>& distances, const std::optional<Tensor>& rescored, const char* op) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  // A tile's number times the groups of a thread, and a blob's number, are 32-bit integers.
  STD_TORCH_CHECK(s.outer * s.inner <= kMost && s.codes <= kMost / 4 && s.channels <= kMost / 4 && s.codes / 64 * (s.channels / 16 + 1) <= kMost,
                  op, ": ", s.outer * s.inner, " rows, ", s.codes, " codes and ", s.channels,
                  " channels; expected fewer than 2^31 rows, and codes times channels below 2^41");
  const auto* codes = static_cast<const T*>(codebook.const_data_ptr());
  return {row_view<T>(x),
          {codes, static_cast<int>(s.codes), static_cast<int>(s.channels), fours<T>(codes, s.channels, 1, {})},
          s.outer * s.inner,
          cosine,
          {static_cast<int64_t*>(indices.mutable_data_ptr()), pointer<float>(distances), pointer<unsigned long long>(rescored), s.inner,
           static_cast<int>(s.heads)}};
}

}  // namespace fastsr::cuda
