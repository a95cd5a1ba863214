// fastsr::rcab and its backward on a CPU: the residual channel attention block in two passes over the pictures, and four.
//
//     forward    x --conv1, ReLU--> r, and per row the sums of r that the taps of conv2 see
//                sums --W2--> pooled --gate--> s                          vectors of N*F: the gate is known before conv2 runs
//                r --conv2, * res_scale * s, + x--> y
//     backward   r, grad --> G[n], the weight gradient of conv2 for each image --> ds --gate--> e, dW2, the gate's gradients
//                grad, * res_scale * s + e --flipped conv2, masked by r > 0--> dr --flipped conv1, + grad--> dx;  x, dr --> dW1
//
// Pictures are taken a few at a time, as many as leave their hidden channels in L2 between the two passes. The gradient of conv2's
// output is never stored: its rows are made while they are copied for the engine (RowInput's scale and shift).
//
// Moves      forward per pixel: x twice, r twice, y;  backward: grad four times, x, r twice, dr three times, dx
// Limit      the FMA units (or tiles): 147,456 FLOP per pixel at 64 channels forward, 294,912 backward; the vectors cost 1-2%
// Learnt     fetching what the epilogue reads and writes while the sums run (RowJob::cold): 3-5% less time from 4x64x64 on, float32 and bfloat16
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/rcab_args.h"
#include "cpu/channels.h"
#include "cpu/conv_rows.h"
#include "cpu/frozen.h"
#include "cpu/gate.h"
#include "cpu/pages.h"
#include "cpu/plane.h"
#include "cpu/rounding.h"
#include "cpu/wgrad.h"

namespace fastsr::cpu {
namespace {

constexpr int64_t kCache = 1 << 20;     // bytes of hidden channels per thread that stay in L2
constexpr int64_t kGradients = 1 << 24;  // bytes of weight gradients of single images at a time
constexpr int64_t kRowsOfSums = 16;     // rows added before their sum is added: a second level, for the rounding error

struct Block {
  RcabShape shape;
  Element type;
  const Kernel& kernel;
  Block(const RcabShape& s, const Tensor& x) : shape(s), type(element_of(x.scalar_type(), "rcab")), kernel(choose_kernel(type)) {}
  int64_t size() const { return type == Element::f32 ? 4 : 2; }
  int64_t images_together() const {
    const int64_t image = shape.pixels() * shape.hidden * size();
    return std::max<int64_t>(1, kCache * torch::stable::get_num_threads() / image);
  }
};

// One convolution of the block.
struct Pass {
  PackedConv conv;
  RowInput::Layout in;
  Plane out, mask, skip;
  float slope = 1.f;
  const float* gate = nullptr;  // [image][gate_stride]
  int64_t gate_stride = 0;
};

RowInput::Layout layout_of(const Tensor& t, Element type) {
  return {t.const_data_ptr(), type, t.stride(0), t.stride(2), t.stride(3), t.size(1), t.size(2), t.size(3), 1};
}

// The rows of images [first, last).
template <class Done>
void convolve(const Block& b, const Pass& p, int64_t first, int64_t last, Done done) {
  const int64_t size = b.size(), height = b.shape.height;
  RowJob common{};
  common.conv = &p.conv;
  common.cold = true;  // of pictures that do not fit into the caches; of others the fetches cost nothing
  common.out_pixel = p.out.w;
  common.epilogue.slope = p.slope;
  common.epilogue.mask_pixel = p.mask.w, common.epilogue.skip_pixel = p.skip.w;
  const auto place = [&](RowJob& job, int64_t n, int64_t y) {
    job.out = p.out.row(n, y, size);
    job.epilogue.mask = p.mask.row(n, y, size), job.epilogue.skip = p.skip.row(n, y, size);
    job.epilogue.gate = p.gate ? p.gate + n * p.gate_stride : nullptr;
  };
  convolve_rows(b.kernel, p.in, b.type, common, first * height, last * height, place, done);
}

void convolve(const Block& b, const Pass& p, int64_t first, int64_t last) {
  convolve(b, p, first, last, [](int64_t, const RowJob&) {});
}

// A bias of the pictures' type, or zeros, as float32.
std::vector<float> floats_of(const Block& b, const void* bias, int64_t count) {
  std::vector<float> values(count, 0.f);
  if (!bias) return values;
  const auto multiply = choose_attention().multiply[static_cast<int>(b.type)];
  multiply(bias, bias, nullptr, count, 0, values.data());  // the product of no columns, plus the bias
  return values;
}

// The sums of one image that the nine taps see, sums[channel][3][3], from those of its rows, rows[y][3][channel].
void sum_rows(const float* rows, int64_t height, int64_t channels, float* sums) {
  const int64_t length = 3 * channels;
  std::vector<float> inner(length, 0.f), part(length);  // of the rows between the first and the last
  for (int64_t y = 1; y + 1 < height; y += kRowsOfSums) {
    std::fill(part.begin(), part.end(), 0.f);
    for (int64_t i = y; i < std::min(y + kRowsOfSums, height - 1); ++i) {
      for (int64_t k = 0; k < length; ++k) part[k] += rows[i * length + k];
    }
    for (int64_t k = 0; k < length; ++k) inner[k] += part[k];
  }
  const float *first = rows, *last = rows + (height - 1) * length;
  for (int64_t k = 0; k < length; ++k) {
    float* to = sums + k % channels * 9 + k / channels;
    const bool more = height > 1;
    const float above = more ? first[k] + inner[k] : 0.f;
    to[0] = above, to[3] = more ? above + last[k] : first[k], to[6] = more ? inner[k] + last[k] : 0.f;
  }
}

// pooled[channel] of one image: the mean of conv2's output, from the sums of its input.
void pool(const Block& b, const float* sums, const void* weight2, bool channels_last, const std::vector<float>& bias2, float* pooled) {
  const int64_t hidden = b.shape.hidden, length = 9 * hidden;
  const float part = 1.f / static_cast<float>(b.shape.pixels());
  std::vector<float> means(length);
  for (int64_t i = 0; i < length; ++i) means[channels_last ? i % 9 * hidden + i / 9 : i] = sums[i] * part;
  const auto dots = choose_channel_kernel().dots[static_cast<int>(b.type)];
  dots(weight2, means.data(), 0, b.shape.features, length, pooled);
  for (int64_t c = 0; c < b.shape.features; ++c) pooled[c] += bias2[c];
}

// The gate, its weights in the pictures' dtype.
GateWeights gate_of(const Tensor& x, const Tensor& weight1, const Tensor& down_weight, const std::optional<Tensor>& down_bias,
                    const Tensor& up_weight, const std::optional<Tensor>& up_bias, std::vector<Tensor>& kept) {
  GateWeights gate = gate_weights("rcab", weight1.scalar_type(), x.size(1), down_weight, down_bias, up_weight, up_bias,
                                  static_cast<int64_t>(Gate::sigmoid), static_cast<int64_t>(Activation::relu));
  const ScalarType type = x.scalar_type();
  gate.type = element_of(type, "rcab");
  gate.down_weight = values_as(type, down_weight, kept), gate.down_bias = values_as(type, down_bias, kept);
  gate.up_weight = values_as(type, up_weight, kept), gate.up_bias = values_as(type, up_bias, kept);
  return gate;
}

void rcab(Tensor x, Tensor weight1, std::optional<Tensor> bias1, Tensor weight2, std::optional<Tensor> bias2, Tensor down_weight,
          std::optional<Tensor> down_bias, Tensor up_weight, std::optional<Tensor> up_bias, Tensor hidden, Tensor sums, Tensor attention,
          Tensor out, double res_scale, std::optional<Tensor> packed, bool /* tf32: a GPU's */) {
  const Block b(rcab_shape(x, weight1, weight2, hidden, sums, attention), x);
  const auto [batch, features, channels, height, width] = b.shape;
  check_rcab_pixels(out, x, features, "out");
  check_rcab_bias(bias1, weight1, "bias1");
  check_rcab_bias(bias2, weight2, "bias2");
  check_rcab_dense(weight2, bias2);
  std::vector<Tensor> kept;
  const GateWeights gate = gate_of(x, weight1, down_weight, down_bias, up_weight, up_bias, kept);
  if (x.numel() == 0) return;
  prefer_huge_output(out);

  PackedConvs convs(b.kernel, b.type, {{channels, features}, {features, channels}}, packed);
  const PackedConv conv1 = convs.take(weight1, bias1), conv2 = convs.take(weight2, bias2);
  const int64_t together = std::min(batch, b.images_together()), padded = (features + 15) / 16 * 16;
  thread_local Buffer memory;
  float* scales = static_cast<float*>(memory.reserve((batch * padded + together * height * 3 * channels) * 4));
  float *row_sums = scales + batch * padded, *taps = static_cast<float*>(sums.mutable_data_ptr());
  const std::vector<float> biases = floats_of(b, values_as(x.scalar_type(), bias2, kept), features);
  const void* filters = values_as(x.scalar_type(), weight2, kept);
  float *pooled = static_cast<float*>(attention.mutable_data_ptr()), *s = pooled + batch * features;

  const Pass first{conv1, layout_of(x, b.type), Plane(hidden), {}, {}, 0.f};
  const Pass second{conv2, layout_of(hidden, b.type), Plane(out), {}, Plane(x), 1.f, scales, padded};
  const auto sum_row = choose_channel_kernel().sum_row[static_cast<int>(b.type)];
  for (int64_t n = 0; n < batch; n += together) {
    const int64_t end = std::min(n + together, batch);
    convolve(b, first, n, end, [&](int64_t row, const RowJob& job) {
      sum_row(job.out, job.out_pixel, width, channels, row_sums + (row - n * height) * 3 * channels);
    });
    torch::stable::parallel_for(n, end, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        sum_rows(row_sums + (i - n) * height * 3 * channels, height, channels, taps + i * channels * 9);
        pool(b, taps + i * channels * 9, filters, !weight2.is_contiguous(), biases, pooled + i * features);
      }
    });
    gate_forward(gate, pooled + n * features, end - n, s + n * features);
    for (int64_t i = n; i < end; ++i) {
      for (int64_t c = 0; c < padded; ++c) scales[i * padded + c] = c < features ? static_cast<float>(res_scale) * s[i * features + c] : 0.f;
    }
    convolve(b, second, n, end);
  }
}

// A convolution's data gradient is the convolution with flipped taps whose inputs and outputs change places.
PackedConv take_flipped(PackedConvs& convs, const Block& b, const Tensor& w) {
  const PackedConv conv = convs.take(w.size(1), w.size(0));
  const Element given = element_of(w.scalar_type(), "rcab");
  const char* last = static_cast<const char*>(w.const_data_ptr()) + (2 * w.stride(2) + 2 * w.stride(3)) * (given == Element::f32 ? 4 : 2);
  pack_weights(b.kernel, conv, {last, given, w.stride(1), w.stride(0), -w.stride(2), -w.stride(3), b.type}, 0, w.size(0));
  pack_bias(b.kernel, conv, nullptr, b.type, 0, b.type);
  return conv;
}

GradientView view_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(2), t.stride(3)}; }

// Where the backward of the block's second half leaves what its first half and the parameters need.
struct Attention {
  const float *taps, *pooled, *s;  // saved by the forward
  float *scales, *shifts;          // du = scales[n][c] * grad + shifts[n][c]
  std::vector<float> dweight2, dbias2;
  std::vector<float> tape;
};

// The products a[i] * b[i] from `begin` on, summed in float64: the terms cancel, and in float32 the sum would be worse than eager's.
template <class T>
double dot_of(const void* a, const float* b, int64_t begin, int64_t length) {
  constexpr int kSums = 8;
  const T* p = static_cast<const T*>(a) + begin;
  const float* q = b + begin;
  double sums[kSums] = {};
  for (int64_t i = 0; i < length; ++i) sums[i % kSums] += static_cast<double>(static_cast<float>(p[i])) * q[i];
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

double dot(Element type, const void* a, const float* b, int64_t begin, int64_t length) {
  switch (type) {
    case Element::f32: return dot_of<float>(a, b, begin, length);
    case Element::bf16: return dot_of<torch::headeronly::BFloat16>(a, b, begin, length);
    default: return dot_of<torch::headeronly::Half>(a, b, begin, length);
  }
}

// Steps 6, 7 and 9: the gate's backward from the weight gradients of single images, and with them dweight2 and dbias2.
void attention_backward(const Block& b, Attention& a, const GateWeights& gate, const Tensor& grad, const Tensor& hidden, const Tensor& weight2,
                        const std::optional<Tensor>& bias2, float res_scale) {
  const auto [batch, features, channels, height, width] = b.shape;
  const int64_t length = 9 * channels, size = b.size();
  const int64_t together = std::min(batch, std::max<int64_t>(2 * torch::stable::get_num_threads(), kGradients / (features * length * 4)));
  std::vector<Tensor> kept;
  const std::vector<float> biases = floats_of(b, values_as(grad.scalar_type(), bias2, kept), features);
  const void* filters = values_as(grad.scalar_type(), weight2, kept);
  const GateTape tape(gate, batch, a.tape.data());
  Tensor memory = torch::stable::new_empty(grad, {together, features, length + 1}, ScalarType::Float);
  float *all = static_cast<float*>(memory.mutable_data_ptr()), *sums = all + together * features * length;
  std::vector<WeightGradient> jobs;
  std::vector<float> ds(features), dpooled(features);
  for (int64_t n = 0; n < batch; n += together) {
    const int64_t count = std::min(together, batch - n);
    jobs.clear();
    for (int64_t i = 0; i < count; ++i) {
      GradientView r = view_of(hidden), g = view_of(grad);
      r.data = static_cast<const char*>(r.data) + (n + i) * r.n * size, g.data = static_cast<const char*>(g.data) + (n + i) * g.n * size;
      jobs.push_back({r, g, channels, features, all + i * features * length, sums + i * features, true});
    }
    weight_gradients(jobs.data(), static_cast<int>(count), 1, height, width, b.type, 1.f);
    for (int64_t i = 0; i < count; ++i) {
      const float* of_image = all + i * features * length;
      float *scales = a.scales + (n + i) * features, *shifts = a.shifts + (n + i) * features;
      for (int64_t c = 0; c < features; ++c) {
        const double product = dot(b.type, filters, of_image, c * length, length);
        ds[c] = static_cast<float>(res_scale * (product + static_cast<double>(biases[c]) * sums[i * features + c]));
      }
      const float* s = a.s + (n + i) * features;
      gate_backward(gate, tape, n + i, a.pooled + (n + i) * features, s, ds.data(), dpooled.data());
      for (int64_t c = 0; c < features; ++c) scales[c] = res_scale * s[c], shifts[c] = dpooled[c] / static_cast<float>(b.shape.pixels());
    }
    torch::stable::parallel_for(0, a.dweight2.empty() ? 0 : features, 16, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) {
        for (int64_t i = 0; i < count; ++i) {
          const float scale = a.scales[(n + i) * features + c], shift = a.shifts[(n + i) * features + c];
          choose_channel_kernel().accumulate(&a.dweight2[c * length], scale, all + (i * features + c) * length, shift, a.taps + (n + i) * length, length);
          a.dbias2[c] += scale * sums[i * features + c] + shift * static_cast<float>(b.shape.pixels());
        }
      }
    });
  }
}

void rcab_backward(Tensor grad, Tensor x, Tensor hidden, Tensor sums, Tensor attention, Tensor weight1, Tensor weight2, std::optional<Tensor> bias2,
                   Tensor down_weight, std::optional<Tensor> down_bias, Tensor up_weight, Tensor grad_hidden, std::optional<Tensor> dx,
                   std::vector<Tensor> gradients, double res_scale, bool /* tf32 */) {
  const Block b(rcab_shape(x, weight1, weight2, hidden, sums, attention), x);
  const auto [batch, features, channels, height, width] = b.shape;
  check_rcab_pixels(grad, x, features, "grad");
  check_rcab_backward(x, b.shape, weight2, bias2, grad_hidden, dx, gradients);
  if (x.numel() == 0) return;
  std::vector<Tensor> kept;
  const GateWeights gate = gate_of(x, weight1, down_weight, down_bias, up_weight, std::nullopt, kept);

  std::vector<float> factors(2 * batch * features);
  Attention a;
  a.taps = static_cast<const float*>(sums.const_data_ptr());
  a.pooled = static_cast<const float*>(attention.const_data_ptr()), a.s = a.pooled + batch * features;
  a.scales = factors.data(), a.shifts = a.scales + batch * features;
  a.tape.resize(GateTape::floats(gate, batch));
  if (!gradients.empty()) a.dweight2.resize(features * channels * 9, 0.f), a.dbias2.resize(features, 0.f);
  attention_backward(b, a, gate, grad, hidden, weight2, bias2, static_cast<float>(res_scale));

  PackedConvs convs(b.kernel, b.type, {{channels, features}, {features, channels}});
  Pass second{take_flipped(convs, b, weight2), layout_of(grad, b.type), Plane(grad_hidden), Plane(hidden), {}, 0.f};
  second.in.scale = a.scales, second.in.shift = a.shifts;
  Pass first;
  if (dx) first = {take_flipped(convs, b, weight1), layout_of(grad_hidden, b.type), Plane(*dx), {}, Plane(grad)};
  const int64_t together = b.images_together();
  for (int64_t n = 0; n < batch; n += together) {
    const int64_t end = std::min(n + together, batch);
    convolve(b, second, n, end);
    if (dx) convolve(b, first, n, end);
  }
  if (gradients.empty()) return;
  void* to[8];
  for (int i = 0; i < 8; ++i) to[i] = gradients[i].mutable_data_ptr();
  const WeightGradient job{view_of(x), view_of(grad_hidden), features, channels, to[0], to[1], is_wide(weight1, x)};
  weight_gradients(&job, 1, batch, height, width, b.type, 1.f);
  const float one = 1.f;
  GateWeights results = gate;  // gradients have the parameters' dtype
  results.type = element_of(weight1.scalar_type(), "rcab");
  const auto outer = choose_attention().outer[static_cast<int>(results.type)];
  outer(&one, a.dweight2.data(), 1, 1, features * channels * 9, to[2], nullptr);
  outer(&one, a.dbias2.data(), 1, 1, features, to[3], nullptr);
  gate_weight_gradients(results, GateTape(gate, batch, a.tape.data()), batch, a.pooled, {to[4], to[5], to[6], to[7]});
}

}  // namespace
}  // namespace fastsr::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsr, CPU, m) {
  m.impl("rcab", TORCH_BOX(&fastsr::cpu::rcab));
  m.impl("rcab_backward", TORCH_BOX(&fastsr::cpu::rcab_backward));
}
