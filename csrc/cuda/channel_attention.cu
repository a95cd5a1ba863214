// fastsr::channel_attention and its backward on NVIDIA GPUs of compute capability 8.0 and higher; channel_attention.cuh tells how.
#include "cuda/channel_attention.cuh"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>

#include "cuda/gate_tensors.cuh"

namespace fastsr::cuda {
namespace {

using Given = std::optional<Tensor>;

const char* const kOp = "channel_attention";

template <class T>
Picture<T> picture(const Given& t) {
  if (!t) return {};
  return {static_cast<T*>(const_cast<void*>(t->const_data_ptr())), t->stride(0), t->stride(1), t->stride(2), t->stride(3)};
}

template <class T, class... Pictures>
AttentionShape shape_of(const Tensor& x, const PictureLayout& layout, double scale, const Pictures&... pictures) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - (1 << 16);  // a thread counts some thousand items beyond the last
  STD_TORCH_CHECK(x.size(1) <= kMost && x.size(2) * x.size(3) <= kMost, kOp, ": images of ", x.size(1), " channels and ",
                  x.size(2) * x.size(3), " pixels; expected fewer than 2^31 - 2^16");
  // One channel lies both ways: as a plane its pixels are loaded side by side.
  const bool planar = !layout.pixels || (layout.planes && x.size(1) == 1);
  return attention_shape(x.size(0), static_cast<int>(x.size(1)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)), planar,
                         static_cast<float>(scale), pictures...);
}

void channel_attention(Tensor x, Given down_weight, Given down_bias, Tensor up_weight, Given up_bias, Given residual, Tensor out,
                       Given pooled, Given gates, double res_scale, int64_t gate, int64_t activation) {
  const PictureLayout layout = residual ? picture_layout(x, *residual, out) : picture_layout(x, out);
  if (pooled) check_attention_vector(*pooled, x, "pooled");
  if (gates) check_attention_vector(*gates, x, "gates");
  if (x.numel() == 0) return;
  const Launcher launch(x);
  const Scratch allocate(x);
  with_element_type(x, kOp, [&]<class T>(T) {
    const auto a = picture<const T>(x), b = picture<const T>(residual);
    const auto y = picture<T>(out);
    Attention(launch, allocate, shape_of<T>(x, layout, res_scale, a, b, y),
              gate_call<T>(kOp, x.scalar_type(), x.size(1), down_weight, down_bias, up_weight, up_bias, gate, activation))
        .forward(a, b, y, pointer<float>(pooled), pointer<float>(gates));
  });
}

void channel_attention_backward(Tensor grad, Tensor x, Tensor pooled, Tensor gates, Given down_weight, Given down_bias, Tensor up_weight,
                                Given dx, Given ddown_weight, Given ddown_bias, Given dup_weight, Given dup_bias, double res_scale,
                                int64_t gate, int64_t activation) {
  const PictureLayout layout = dx ? picture_layout(x, grad, *dx) : picture_layout(x, grad);
  check_attention_vector(pooled, x, "pooled");
  check_attention_vector(gates, x, "gates");
  const Launcher launch(x);
  const Scratch allocate(x);
  with_element_type(x, kOp, [&]<class T>(T) {
    const auto g = picture<const T>(grad), a = picture<const T>(x);
    const auto d = picture<T>(dx);
    Attention(launch, allocate, shape_of<T>(x, layout, res_scale, a, g, d),
              gate_call<T>(kOp, x.scalar_type(), x.size(1), down_weight, down_bias, up_weight, std::nullopt, gate, activation))
        .backward(g, a, pointer<float>(pooled), pointer<float>(gates), d,
                  {pointer<T>(ddown_weight), pointer<T>(ddown_bias), pointer<T>(dup_weight), pointer<T>(dup_bias)});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsr, CUDA, m) {
  m.impl("channel_attention", TORCH_BOX(&channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&channel_attention_backward));
}

}  // namespace fastsr::cuda
