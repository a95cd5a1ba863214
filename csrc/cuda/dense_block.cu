// fastsr::dense_block, its features alone and its backward on NVIDIA GPUs of compute capability 8.0 and higher; see dense_block.cuh.
#include "cuda/dense_block.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <utility>
#include <vector>

#include "common/dense_block_args.h"
#include "cuda/conv3x3_instances.cuh"
#include "cuda/image_tensors.cuh"

namespace fastsr::cuda {

namespace {

using Biases = std::vector<std::optional<Tensor>>;

const char* const kOp = "dense_block";

template <class T>
DenseBlock<T> describe(const DenseBlockShape& s, const Tensor& like, const std::vector<Tensor>& weights, const Biases& biases,
                       double negative_slope) {
  const int height = checked_int(s.height, kOp, "the height"), width = checked_int(s.width, kOp, "the width");
  DenseBlock<T> block{s.batch, height, width, static_cast<float>(negative_slope), {}};
  checked_int(s.channels + s.begin.front(), kOp, "the number of channels");
  for (size_t k = 0; k < weights.size(); ++k) {
    const Tensor& w = weights[k];
    DenseConv<T> conv{};
    conv.weight = parameter<T>(w, like);
    conv.weight_strides = {w.stride(0), w.stride(1), w.stride(2), w.stride(3)};
    if (k < biases.size() && biases[k]) {
      conv.bias = parameter<T>(biases[k], like), conv.bias_stride = biases[k]->stride(0);
    }
    conv.begin = static_cast<int>(s.begin[k]), conv.outputs = static_cast<int>(s.outputs[k]);
    block.convs.push_back(conv);
  }
  return block;
}

void dense_block(Tensor x, std::vector<Tensor> weights, Biases biases, std::optional<Tensor> residual, std::optional<Tensor> given,
                 Tensor out, double negative_slope, double res_scale, double residual_scale,
                 std::optional<Tensor> /* packed: only the CPU has frozen weights */, bool tf32) {
  STD_TORCH_CHECK(given.has_value(), "dense_block: no workspace; expected one on a GPU");
  Tensor workspace = *given;
  const DenseBlockShape s = dense_block_shape(workspace, weights, x.size(1), true);
  check_pixel_major(workspace, x, s.channels, "workspace");
  check_pixel_major(x, workspace, x.size(1), "x");
  check_pixel_major(out, workspace, x.size(1), "out");
  if (residual) check_pixel_major(*residual, workspace, x.size(1), "residual");
  check_biases(biases, s, weights);
  if (out.numel() == 0) return;
  const Launcher launch(workspace);
  const Scratch allocate(workspace);
  with_products(workspace, tf32, kOp, [&]<class Products, class T>(Products, T) {
    const float scale = residual ? static_cast<float>(residual_scale) : 1.0f;
    block_forward<Products, T>(launch, allocate, describe<T>(s, workspace, weights, biases, negative_slope), image_view<T>(x),
                           residual ? image_view<T>(*residual) : ImageView<const T>{}, mutable_image_view<T>(workspace), mutable_image_view<T>(out),
                           static_cast<float>(res_scale), scale);
  });
}

void dense_block_features(Tensor x, std::vector<Tensor> weights, Biases biases, Tensor workspace, double negative_slope, bool tf32) {
  const DenseBlockShape s = dense_block_shape(workspace, weights, x.size(1), false);
  check_pixel_major(workspace, x, s.channels, "workspace");
  check_pixel_major(x, workspace, x.size(1), "x");
  check_biases(biases, s, weights);
  if (workspace.numel() == 0) return;
  const Launcher launch(workspace);
  const Scratch allocate(workspace);
  with_products(workspace, tf32, kOp, [&]<class Products, class T>(Products, T) {
    block_features<Products, T>(launch, allocate, describe<T>(s, workspace, weights, biases, negative_slope), image_view<T>(x),
                            checked_int(x.size(1), kOp, "the number of features"), mutable_image_view<T>(workspace));
  });
}

void dense_block_backward(Tensor grad, Tensor workspace, std::vector<Tensor> weights, Tensor grad_workspace, std::optional<Tensor> dx,
                          std::vector<Tensor> dweights, std::vector<Tensor> dbiases, double negative_slope, double res_scale,
                          double residual_scale, bool tf32) {
  const DenseBlockShape s = dense_block_shape(workspace, weights, grad.size(1), true);
  check_pixel_major(workspace, grad, s.channels, "workspace");
  check_pixel_major(grad, workspace, grad.size(1), "grad");
  check_pixel_major(grad_workspace, workspace, s.channels, "grad_workspace");
  if (dx) check_pixel_major(*dx, workspace, grad.size(1), "dx");
  STD_TORCH_CHECK(dweights.size() == dbiases.size() && (dweights.empty() || dweights.size() == weights.size()), "dense_block: ",
                  dweights.size(), " and ", dbiases.size(), " gradients for ", weights.size(), " weights");
  for (size_t k = 0; k < dweights.size(); ++k) {
    STD_TORCH_CHECK(dweights[k].is_contiguous() && dweights[k].numel() == weights[k].numel() && dbiases[k].is_contiguous() &&
                        dbiases[k].numel() == s.outputs[k] && dweights[k].scalar_type() == weights[k].scalar_type() &&
                        dbiases[k].scalar_type() == weights[k].scalar_type(),
                    "dense_block: the gradients of weight and bias ", k, " do not fit; expected contiguous tensors like them");
  }
  if (workspace.numel() == 0) return;
  const Launcher launch(workspace);
  const Scratch allocate(workspace);
  with_products(workspace, tf32, kOp, [&]<class Products, class T>(Products, T) {
    std::vector<std::pair<void*, void*>> gradients;
    for (size_t k = 0; k < dweights.size(); ++k) {
      gradients.emplace_back(dweights[k].mutable_data_ptr(), dbiases[k].mutable_data_ptr());
    }
    block_backward<Products, T>(launch, allocate, describe<T>(s, workspace, weights, {}, negative_slope), image_view<T>(grad), image_view<T>(workspace),
                            mutable_image_view<T>(grad_workspace), dx ? mutable_image_view<T>(*dx) : ImageView<T>{}, gradients,
                            static_cast<float>(res_scale), static_cast<float>(residual_scale));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsr, CUDA, m) {
  m.impl("dense_block", TORCH_BOX(&fastsr::cuda::dense_block));
  m.impl("dense_block_features", TORCH_BOX(&fastsr::cuda::dense_block_features));
  m.impl("dense_block_backward", TORCH_BOX(&fastsr::cuda::dense_block_backward));
}

}  // namespace fastsr::cuda
