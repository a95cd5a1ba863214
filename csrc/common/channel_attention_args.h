// The arguments of channel attention's operators, checked once for the CPU and the CUDA kernels.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "common/gate.h"

namespace fastsr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_pixel_major(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1; }
inline bool is_planar(const Tensor& t) { return (t.size(3) <= 1 || t.stride(3) == 1) && (t.size(2) <= 1 || t.stride(2) == t.size(3)); }

// Which layouts all pictures of a call have; at least one.
struct PictureLayout {
  bool pixels, planes;
};

template <class... More>
PictureLayout picture_layout(const Tensor& x, const More&... more) {
  STD_TORCH_CHECK(x.dim() == 4, "channel_attention: x has ", x.dim(), " dimensions; expected 4");
  const auto fits = [&](const Tensor& t) {
    return t.dim() == 4 && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(2) == x.size(2) && t.size(3) == x.size(3) &&
           t.scalar_type() == x.scalar_type();
  };
  STD_TORCH_CHECK((fits(more) && ...), "channel_attention: pictures of different shapes or dtypes");
  const PictureLayout layout{is_pixel_major(x) && (is_pixel_major(more) && ...), is_planar(x) && (is_planar(more) && ...)};
  STD_TORCH_CHECK(layout.pixels || layout.planes,
                  "channel_attention: expected all pictures with channels side by side, or all with contiguous planes");
  return layout;
}

// Checks the gate's tensors for op `op`, whose pictures have `channels` channels of `type`; the length of the squeezed vector.
inline int64_t squeezed_channels(const char* op, ScalarType type, int64_t channels, const std::optional<Tensor>& down_weight,
                                 const std::optional<Tensor>& down_bias, const Tensor& up_weight, const std::optional<Tensor>& up_bias,
                                 int64_t gate, int64_t activation) {
  STD_TORCH_CHECK(gate >= 0 && gate <= 2, op, ": gate is ", gate, "; expected 0 (none), 1 (sigmoid) or 2 (hardsigmoid)");
  STD_TORCH_CHECK(activation >= 0 && activation <= 1, op, ": activation is ", activation, "; expected 0 (relu) or 1 (silu)");
  const auto check = [&](const Tensor& t, const char* name, int64_t rows, int64_t columns) {
    const bool fits = t.dim() >= 1 && t.size(0) == rows && t.numel() == rows * columns;
    STD_TORCH_CHECK(fits && t.is_contiguous() && t.scalar_type() == type, op, ": ", name, " is not a contiguous ", rows, " x ", columns,
                    " of the pictures' dtype");
  };
  const int64_t squeezed = down_weight && down_weight->dim() > 0 ? down_weight->size(0) : channels;
  if (down_weight) check(*down_weight, "down_weight", squeezed, channels);
  if (down_weight && down_bias) check(*down_bias, "down_bias", squeezed, 1);
  check(up_weight, "up_weight", channels, squeezed);
  if (up_bias) check(*up_bias, "up_bias", channels, 1);
  return squeezed;
}

// A float32 value per image and channel.
inline void check_attention_vector(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.numel() == x.size(0) * x.size(1) && t.is_contiguous() && t.scalar_type() == ScalarType::Float, "channel_attention: ", name,
                  " is not a contiguous float32 tensor of a value per image and channel");
}

}  // namespace fastsr
