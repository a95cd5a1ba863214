// fastsr::rcab and its backward on NVIDIA GPUs of compute capability 8.0 and higher; the kernels are in rcab.cuh.
#include "cuda/rcab.cuh"

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <vector>

#include "common/rcab_args.h"
#include "cuda/conv3x3_instances.cuh"
#include "cuda/gate_tensors.cuh"
#include "cuda/image_tensors.cuh"

namespace fastsr::cuda {

namespace {

using Given = std::optional<Tensor>;

const char* const kOp = "rcab";

template <class T>
RcabConv<T> conv_of(const Tensor& x, const Tensor& w, const Given& bias) {
  return {parameter<T>(w, x), {w.stride(0), w.stride(1), w.stride(2), w.stride(3)}, parameter<T>(bias, x), bias ? bias->stride(0) : 0,
          static_cast<int>(w.size(1)), static_cast<int>(w.size(0))};
}

template <class T>
RcabCall<T> call_of(const RcabShape& s, const Tensor& x, const Tensor& weight1, const Given& bias1, const Tensor& weight2, const Given& bias2,
                    const Tensor& down_weight, const Given& down_bias, const Tensor& up_weight, const Given& up_bias, double res_scale) {
  checked_int(s.features * 9, kOp, "nine times the number of channels"), checked_int(s.hidden * 9, kOp, "nine times the hidden channels");
  GateCall<T> gate = gate_call<T>(kOp, weight1.scalar_type(), s.features, down_weight, down_bias, up_weight, up_bias,
                                        static_cast<int64_t>(Gate::sigmoid), static_cast<int64_t>(Activation::relu));
  if (is_wide(weight1, x)) gate.down_weight = gate.down_bias = gate.up_weight = gate.up_bias = nullptr;
  return {s.batch, checked_int(s.height, kOp, "the height"), checked_int(s.width, kOp, "the width"), conv_of<T>(x, weight1, bias1),
          conv_of<T>(x, weight2, bias2), gate,
          {parameter<T>(down_weight, x), parameter<T>(down_bias, x), parameter<T>(up_weight, x), parameter<T>(up_bias, x)},
          static_cast<float>(res_scale)};
}

RcabVectors vectors_of(const RcabShape& s, const Tensor& sums, const Tensor& attention) {
  float* pooled = static_cast<float*>(attention.mutable_data_ptr());
  return {static_cast<float*>(sums.mutable_data_ptr()), pooled, pooled + s.batch * s.features};
}

void rcab(Tensor x, Tensor weight1, Given bias1, Tensor weight2, Given bias2, Tensor down_weight, Given down_bias, Tensor up_weight,
          Given up_bias, Tensor hidden, Tensor sums, Tensor attention, Tensor out, double res_scale,
          Given /* packed: only the CPU has frozen weights */, bool tf32) {
  const RcabShape s = rcab_shape(x, weight1, weight2, hidden, sums, attention);
  check_rcab_pixels(out, x, s.features, "out");
  check_rcab_bias(bias1, weight1, "bias1");
  check_rcab_bias(bias2, weight2, "bias2");
  check_rcab_dense(weight2, bias2);
  if (x.numel() == 0) return;
  const Launcher launch(x);
  const Scratch allocate(x);
  with_products(x, tf32, kOp, [&]<class Products, class T>(Products, T) {
    const RcabCall<T> call = call_of<T>(s, x, weight1, bias1, weight2, bias2, down_weight, down_bias, up_weight, up_bias, res_scale);
    Rcab<Products, T, Launcher, Scratch>(launch, allocate, call)
        .forward(image_view<T>(x), mutable_image_view<T>(hidden), vectors_of(s, sums, attention), mutable_image_view<T>(out));
  });
}

void rcab_backward(Tensor grad, Tensor x, Tensor hidden, Tensor sums, Tensor attention, Tensor weight1, Tensor weight2, Given bias2,
                   Tensor down_weight, Given down_bias, Tensor up_weight, Tensor grad_hidden, Given dx, std::vector<Tensor> gradients,
                   double res_scale, bool tf32) {
  const RcabShape s = rcab_shape(x, weight1, weight2, hidden, sums, attention);
  check_rcab_pixels(grad, x, s.features, "grad");
  check_rcab_backward(x, s, weight2, bias2, grad_hidden, dx, gradients);
  if (x.numel() == 0) return;
  const Launcher launch(x);
  const Scratch allocate(x);
  with_products(x, tf32, kOp, [&]<class Products, class T>(Products, T) {
    const RcabCall<T> call = call_of<T>(s, x, weight1, std::nullopt, weight2, bias2, down_weight, down_bias, up_weight, std::nullopt, res_scale);
    std::array<void*, 8> to{};
    for (size_t i = 0; i < gradients.size(); ++i) to[i] = gradients[i].mutable_data_ptr();
    Rcab<Products, T, Launcher, Scratch>(launch, allocate, call)
        .backward(image_view<T>(grad), image_view<T>(x), image_view<T>(hidden), vectors_of(s, sums, attention),
                  mutable_image_view<T>(grad_hidden), dx ? mutable_image_view<T>(*dx) : ImageView<T>{},
                  gradients.empty() ? nullptr : to.data());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsr, CUDA, m) {
  m.impl("rcab", TORCH_BOX(&rcab));
  m.impl("rcab_backward", TORCH_BOX(&rcab_backward));
}

}  // namespace fastsr::cuda
