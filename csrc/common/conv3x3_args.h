// The arguments of fastsr::conv3x3 as plain numbers, checked once for the CPU and the CUDA kernels.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "common/parameters.h"

namespace fastsr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where the pixels of an (N, C, H, W) tensor lie, in elements; the channels of a pixel lie side by side.
struct Pixels {
  int64_t n, h, w;  // strides of image, row and pixel
};

struct Conv3x3Args {
  int64_t batch, cin, cout;    // cout counts the convolution's channels, before PixelShuffle
  int64_t height, width;       // of the convolution's output: x's size times `upsample`
  int upsample, pixel_shuffle;
  float negative_slope, scale; // a slope of 1 is no activation, 0 is ReLU
  Pixels x, out, residual;
};

inline Pixels pixels_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, "conv3x3: ", name, " has ", t.dim(), " dimensions; expected 4");
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, "conv3x3: ", name, " has channel stride ", t.stride(1),
                  "; expected 1 (channels-last, or a channel slice of it)");
  return {t.stride(0), t.stride(2), t.stride(3)};
}

// Python has checked the public arguments; this guards the library's own entry.
inline Conv3x3Args conv3x3_args(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& residual, const Tensor& out, double negative_slope,
                                double scale, int64_t upsample, int64_t pixel_shuffle) {
  Conv3x3Args a{};
  a.x = pixels_of(x, "x");
  a.out = pixels_of(out, "out");
  const int64_t r = pixel_shuffle;
  STD_TORCH_CHECK(upsample == 1 || upsample == 2, "conv3x3: upsample is ", upsample, "; expected 1 or 2");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3,
                  "conv3x3: weight does not fit x with ", x.size(1), " channels; expected (O, C, 3, 3)");
  a.batch = x.size(0), a.cin = x.size(1), a.cout = weight.size(0);
  a.height = x.size(2) * upsample, a.width = x.size(3) * upsample;
  STD_TORCH_CHECK(r >= 1 && a.cout % (r * r) == 0, "conv3x3: pixel_shuffle is ", r, " for ", a.cout, " channels");
  auto has_output_shape = [&](const Tensor& t) {
    return t.dim() == 4 && t.size(0) == a.batch && t.size(1) == a.cout / (r * r) && t.size(2) == a.height * r &&
           t.size(3) == a.width * r && t.scalar_type() == x.scalar_type();
  };
  STD_TORCH_CHECK(has_output_shape(out), "conv3x3: out has not the output's shape or dtype");
  STD_TORCH_CHECK(fits_pictures(weight, x), "conv3x3: weight has neither x's dtype nor float32");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == a.cout && bias->scalar_type() == weight.scalar_type(),
                    "conv3x3: bias has not one value of the weight's dtype per output channel");
  }
  if (residual) {
    STD_TORCH_CHECK(has_output_shape(*residual), "conv3x3: residual has not the output's shape or dtype");
    a.residual = pixels_of(*residual, "residual");
  }
  a.upsample = static_cast<int>(upsample), a.pixel_shuffle = static_cast<int>(r);
  a.negative_slope = static_cast<float>(negative_slope), a.scale = static_cast<float>(scale);
  return a;
}

}  // namespace fastsr
