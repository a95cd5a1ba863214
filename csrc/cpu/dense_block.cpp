// fastsr::dense_block and its backward on a CPU: a chain of convolutions that grows one workspace.
//
//     workspace row   [ x | a1 | a2 | a3 | a4 ]          stage k reads the prefix up to a_k and writes a_(k+1); the last
//                       --------> stage 0                writes the block's output. The backward's chain runs over
//                       -------------> stage 1 ...       [ g5 | g4 | g3 | g2 | g1 ] in the same way.
//
// The chain is walked as a wavefront (chain.cpp). Without a workspace only the rows that are still read exist.
//
// Moves      per pixel and block of 64 features and 4 x 32 growths: 64 values in, 192 + 64 out
// Limit      the FMA units (or tiles): 479,232 FLOP per pixel against 1.3 KB in float32
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/dense_block_args.h"
#include "cpu/chain.h"
#include "cpu/conv_driver.h"
#include "cpu/frozen.h"
#include "cpu/pages.h"
#include "cpu/plane.h"
#include "cpu/wgrad.h"

namespace fastsr::cpu {
namespace {

Chain new_chain(const DenseBlockShape& s, const Tensor& x, const Plane& buffer) {
  const Element type = element_of(x.scalar_type(), "dense_block");
  return {choose_kernel(type), type, s.batch, s.height, s.width, s.channels, buffer, Plane(x), {}};
}

// The first stages: workspace slices with LeakyReLU. `closed`: the caller sets where the last one goes.
void pack_forward(Chain& chain, const DenseBlockShape& s, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                  double negative_slope, const std::optional<Tensor>& packed = std::nullopt) {
  Sizes sizes;
  for (int64_t k = 0; k < s.convs(); ++k) sizes.emplace_back(s.outputs[k], s.begin[k]);
  PackedConvs convs(chain.kernel, chain.type, sizes, packed);
  for (int64_t k = 0; k < s.convs(); ++k) {
    Stage stage;
    stage.conv = convs.take(weights[k], biases[k]);
    stage.inputs = s.begin[k];
    stage.slope = static_cast<float>(negative_slope);
    chain.stages.push_back(stage);
  }
}

// Copy x into the first channels of `to`, times `scale`, unless it lies there already.
void fill_prefix(const Tensor& x, const Plane& to, int64_t channels, Element type) {
  const Plane from(x);
  if (from.data == to.data) return;
  const int64_t size = type == Element::f32 ? 4 : 2, width = x.size(3), height = x.size(2);
  torch::stable::parallel_for(0, x.size(0) * height, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* source = from.row(i / height, i % height, size);
      char* target = to.row(i / height, i % height, size);
      for (int64_t column = 0; column < width; ++column, source += from.w * size, target += to.w * size) std::memcpy(target, source, channels * size);
    }
  });
}

void dense_block(Tensor x, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases, std::optional<Tensor> residual,
                 std::optional<Tensor> workspace, Tensor out, double negative_slope, double res_scale, double residual_scale,
                 std::optional<Tensor> packed, bool /* tf32: a GPU's */) {
  const DenseBlockShape s = dense_block_shape(x, weights, x.size(1), true);
  check_pixel_major(x, x, x.size(1), "x");
  if (workspace) check_pixel_major(*workspace, x, s.channels, "workspace");
  check_pixel_major(out, x, x.size(1), "out");
  if (residual) check_pixel_major(*residual, x, x.size(1), "residual");
  check_biases(biases, s, weights);
  if (out.numel() == 0) return;
  prefer_huge_output(out);
  Chain chain = new_chain(s, x, workspace ? Plane(*workspace) : Plane());
  if (workspace) fill_prefix(x, chain.buffer, x.size(1), chain.type);
  pack_forward(chain, s, weights, biases, negative_slope, packed);
  Stage& last = chain.stages.back();
  last.slope = 1.f;
  last.scale = static_cast<float>(res_scale);
  last.skip_input = true;
  last.out = Plane(out);
  if (residual) last.skip2 = Plane(*residual), last.scale2 = static_cast<float>(residual_scale);
  walk(chain);
}

void dense_block_features(Tensor x, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases, Tensor workspace, double negative_slope,
                          bool /* tf32 */) {
  const DenseBlockShape s = dense_block_shape(workspace, weights, x.size(1), false);
  check_pixel_major(workspace, x, s.channels, "workspace");
  check_pixel_major(x, workspace, x.size(1), "x");
  check_biases(biases, s, weights);
  if (workspace.numel() == 0) return;
  Chain chain = new_chain(s, x, Plane(workspace));
  fill_prefix(x, chain.buffer, x.size(1), chain.type);
  pack_forward(chain, s, weights, biases, negative_slope);
  if (!chain.stages.empty()) walk(chain);
}

// The gradients before scaling by residual_scale, [g_K | ... | g_1], as a chain over `g`; the last stage is dx's.
void pack_backward(Chain& chain, const DenseBlockShape& s, const std::vector<Tensor>& weights, const Tensor& workspace, double negative_slope, bool needs_dx) {
  const int64_t convs = s.convs();
  // Stage j is the gradient at the source that convolution K - 1 - j wrote; for j = K - 1 that is x.
  Sizes sizes;
  int64_t inputs = 0;
  std::vector<int64_t> prefix;
  for (int64_t j = 0; j < convs; ++j) {
    const int64_t source = convs - 2 - j;  // the convolution whose outputs these are, -1 for x
    prefix.push_back(inputs);
    inputs += s.outputs[convs - 1 - j];
    sizes.emplace_back(source < 0 ? s.begin[0] : s.outputs[source], inputs);
  }
  prefix.push_back(inputs);
  PackedConvs packed(chain.kernel, chain.type, sizes);
  for (int64_t j = 0; j < convs - (needs_dx ? 0 : 1); ++j) {
    const int64_t source = convs - 2 - j, first = source < 0 ? 0 : s.begin[source];
    Stage stage;
    stage.conv = packed.take(sizes[j].first, sizes[j].second);
    for (int64_t i = 0; i <= j; ++i) {  // the gradients of convolutions K - 1 .. K - 1 - j, in the buffer's order
      const Tensor& w = weights[convs - 1 - i];
      const Element given = element_of(w.scalar_type(), "dense_block");
      const int64_t at = (first * w.stride(1) + 2 * w.stride(2) + 2 * w.stride(3)) * (given == Element::f32 ? 4 : 2);
      const WeightView view{static_cast<const char*>(w.const_data_ptr()) + at, given, w.stride(1), w.stride(0), -w.stride(2), -w.stride(3), chain.type};
      pack_weights(chain.kernel, stage.conv, view, prefix[i], w.size(0));
    }
    pack_bias(chain.kernel, stage.conv, nullptr, chain.type, 0, chain.type);
    stage.inputs = sizes[j].second;
    if (source >= 0) {
      stage.mask = Plane(workspace).from_channel(first, chain.size());
      stage.slope = static_cast<float>(negative_slope);
    }
    chain.stages.push_back(stage);
  }
}

// grad * factor into the first channels of the gradients' buffer.
template <class T>
void fill_scaled(const Tensor& grad, const Plane& to, float factor) {
  const Plane from(grad);
  const int64_t height = grad.size(2), width = grad.size(3), channels = grad.size(1);
  torch::stable::parallel_for(0, grad.size(0) * height, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* source = reinterpret_cast<const T*>(from.row(i / height, i % height, sizeof(T)));
      T* target = reinterpret_cast<T*>(to.row(i / height, i % height, sizeof(T)));
      for (int64_t column = 0; column < width; ++column, source += from.w, target += to.w) {
        for (int64_t c = 0; c < channels; ++c) target[c] = static_cast<T>(static_cast<float>(source[c]) * factor);
      }
    }
  });
}

void dense_block_backward(Tensor grad, Tensor workspace, std::vector<Tensor> weights, Tensor grad_workspace, std::optional<Tensor> dx,
                          std::vector<Tensor> dweights, std::vector<Tensor> dbiases, double negative_slope, double res_scale,
                          double residual_scale, bool /* tf32 */) {
  const DenseBlockShape s = dense_block_shape(workspace, weights, grad.size(1), true);
  check_pixel_major(workspace, grad, s.channels, "workspace");
  check_pixel_major(grad, workspace, grad.size(1), "grad");
  check_pixel_major(grad_workspace, workspace, s.channels, "grad_workspace");
  if (dx) check_pixel_major(*dx, workspace, grad.size(1), "dx");
  STD_TORCH_CHECK(dweights.size() == dbiases.size() && (dweights.empty() || dweights.size() == weights.size()),
                  "dense_block: ", dweights.size(), " and ", dbiases.size(), " gradients for ", weights.size(), " weights");
  for (size_t k = 0; k < dweights.size(); ++k) {
    STD_TORCH_CHECK(dweights[k].scalar_type() == weights[k].scalar_type() && dbiases[k].scalar_type() == weights[k].scalar_type(),
                    "dense_block: the gradients of weight and bias ", k, " have not the weight's dtype");
  }
  if (workspace.numel() == 0) return;
  Chain chain = new_chain(s, grad, Plane(grad_workspace));
  const float scale = static_cast<float>(residual_scale), factor = static_cast<float>(res_scale);
  switch (chain.type) {
    case Element::f32: fill_scaled<float>(grad, chain.buffer, factor); break;
    case Element::bf16: fill_scaled<torch::headeronly::BFloat16>(grad, chain.buffer, factor); break;
    default: fill_scaled<torch::headeronly::Half>(grad, chain.buffer, factor); break;
  }
  pack_backward(chain, s, weights, workspace, negative_slope, dx.has_value());
  if (dx) {  // everything is linear in grad: residual_scale comes in at the end
    Stage& last = chain.stages.back();
    last.out = Plane(*dx), last.skip = Plane(grad), last.scale2 = scale;
  }
  if (!chain.stages.empty()) walk(chain);
  if (dweights.empty()) return;
  std::vector<WeightGradient> jobs;
  const Plane ws(workspace);
  for (int64_t k = s.convs() - 1, at = 0; k >= 0; --k) {
    const Plane g = chain.buffer.from_channel(at, chain.size());
    jobs.push_back({{ws.data, ws.n, ws.h, ws.w}, {g.data, g.n, g.h, g.w}, s.begin[k], s.outputs[k],
                    dweights[k].mutable_data_ptr(), dbiases[k].mutable_data_ptr(), is_wide(weights[k], workspace)});
    at += s.outputs[k];
  }
  weight_gradients(jobs.data(), static_cast<int>(jobs.size()), s.batch, s.height, s.width, chain.type, scale);
}

}  // namespace
}  // namespace fastsr::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsr, CPU, m) {
  m.impl("dense_block", TORCH_BOX(&fastsr::cpu::dense_block));
  m.impl("dense_block_features", TORCH_BOX(&fastsr::cpu::dense_block_features));
  m.impl("dense_block_backward", TORCH_BOX(&fastsr::cpu::dense_block_backward));
}
