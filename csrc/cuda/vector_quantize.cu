// fastsr::vector_quantize and its gradients on NVIDIA GPUs of compute capability 8.0 and higher; vector_quantize.cuh tells how.
#include "cuda/vector_quantize.cuh"

#include <torch/csrc/stable/library.h>

#include "cuda/vq_tensors.cuh"

namespace fastsr::cuda {

// Compiled in vq_nearest.cu.
extern template void find_nearest(const NearestCall<float>&, const Launcher&, const Scratch&, bool);
extern template void find_nearest(const NearestCall<__half>&, const Launcher&, const Scratch&, bool);
extern template void find_nearest(const NearestCall<__nv_bfloat16>&, const Launcher&, const Scratch&, bool);

namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

NumberedRows numbered(const std::optional<Tensor>& indices, const std::optional<Tensor>& mask, const VqShape& s, const char* op) {
  // Rows, codes of all heads, and their places in the sorted order are 32-bit integers; the last tile ends behind them.
  STD_TORCH_CHECK(s.outer * s.heads * s.inner <= kMost - (1 << 20) && s.heads * s.codes <= kMost - (1 << 20) && s.channels <= kMost / 8, op, ": ",
                  s.outer * s.heads * s.inner, " rows, ", s.heads * s.codes, " codes and ", s.channels,
                  " channels; expected fewer than 2^31 - 2^20 rows and codes of all heads");
  return {pointer<const int64_t>(indices), pointer<const bool>(mask), static_cast<int>(s.outer * s.heads * s.inner), static_cast<int>(s.heads),
          static_cast<int>(s.inner), static_cast<int>(s.codes)};
}

void vector_quantize(Tensor x, Tensor codebook, std::optional<Tensor> mask, bool cosine, bool fast, Tensor quantized, Tensor indices,
                     Tensor loss, Tensor counts, Tensor sums, std::optional<Tensor> distances) {
  const char* op = "vector_quantize";
  const VqShape s = vector_quantize_shape(x, codebook, mask, quantized, indices, loss, counts, sums, distances);
  const NumberedRows rows = numbered(indices, mask, s, op);
  const Launcher launch(x);
  const Scratch allocate(x);
  with_element_type(x, op, [&]<class T>(T) {
    const NearestCall<T> search = nearest_call<T>(x, codebook, s, cosine, indices, distances, std::nullopt, op);
    find_nearest(search, launch, allocate, s.channels >= kTensorDepth);
    quantize(QuantizeCall<T>{search.x, row_view<T>(quantized), search.codebook, rows, static_cast<float*>(loss.mutable_data_ptr()),
                             static_cast<int64_t*>(counts.mutable_data_ptr()), static_cast<float*>(sums.mutable_data_ptr())},
             fast, launch, allocate);
  });
}

void vector_quantize_dx(std::optional<Tensor> grad, std::optional<Tensor> commitment_grad, Tensor x, Tensor quantized, std::optional<Tensor> mask,
                        bool rotation, Tensor dx) {
  const char* op = "vector_quantize_dx";
  check_like(dx, x, op, "dx");
  check_like(quantized, x, op, "quantized");
  check_like(grad, x, op, "grad");
  const VqShape s{x.size(0), x.size(1), x.size(2), x.size(3), 0};
  check_per_row(mask, s, ScalarType::Bool, op, "mask");
  if (commitment_grad) check_statistic(*commitment_grad, 1, ScalarType::Float, op, "commitment_grad");
  const NumberedRows rows = numbered(std::nullopt, mask, s, op);
  const Launcher launch(x);
  const Scratch allocate(x);
  with_element_type(x, op, [&]<class T>(T) {
    input_gradient(InputGradient<T>{grad ? row_view<T>(*grad) : RowView<T>{}, row_view<T>(x), row_view<T>(quantized), row_view<T>(dx), rows,
                                    pointer<const float>(commitment_grad), nullptr, static_cast<int>(s.channels), 1},
                   rotation, launch, allocate);
  });
}

void vector_quantize_dcodebook(Tensor codebook_grad, Tensor x, Tensor quantized, Tensor indices, std::optional<Tensor> mask, bool fast,
                               Tensor dcodebook) {
  const char* op = "vector_quantize_dcodebook";
  const VqShape s = vq_shape(x, dcodebook, op);
  check_like(quantized, x, op, "quantized");
  check_per_row(indices, s, ScalarType::Long, op, "indices");
  check_per_row(mask, s, ScalarType::Bool, op, "mask");
  check_statistic(codebook_grad, 1, ScalarType::Float, op, "codebook_grad");
  const NumberedRows rows = numbered(indices, mask, s, op);
  const Launcher launch(x);
  const Scratch allocate(x);
  with_element_type(x, op, [&]<class T>(T) {
    codebook_gradient(row_view<T>(x), row_view<T>(quantized), rows, static_cast<int>(s.channels),
                      static_cast<const float*>(codebook_grad.const_data_ptr()), static_cast<T*>(dcodebook.mutable_data_ptr()), fast, launch, allocate);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsr, CUDA, m) {
  m.impl("vector_quantize", TORCH_BOX(&vector_quantize));
  m.impl("vector_quantize_dx", TORCH_BOX(&vector_quantize_dx));
  m.impl("vector_quantize_dcodebook", TORCH_BOX(&vector_quantize_dcodebook));
}

}  // namespace fastsr::cuda
