// Runs the gate's small matrices on torch's threads where they are large (NAFNet's are C x C). Each row or column is one thread's.
#include "cpu/gate.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

#include "common/channel_attention_args.h"
#include "cpu/isa.h"

namespace fastsr::cpu {
namespace {

constexpr int64_t kProducts = 1 << 15;  // of a thread's share: about 2 us

int64_t rows_per_thread(int64_t products_per_row) { return std::max<int64_t>(16, kProducts / std::max<int64_t>(1, products_per_row)); }

int64_t bytes_of(Element type) { return type == Element::f32 ? 4 : 2; }

template <class P>
P* at(P* data, int64_t element, Element type) {
  if (!data) return nullptr;
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  return static_cast<Byte*>(data) + element * bytes_of(type);
}

// y = bias + w x
void multiply(Element type, const void* w, const void* bias, const float* x, int64_t rows, int64_t columns, float* y) {
  const AttentionKernel& kernel = choose_attention();
  torch::stable::parallel_for(0, rows, rows_per_thread(columns), [&](int64_t begin, int64_t end) {
    kernel.multiply[static_cast<int>(type)](at(w, begin * columns, type), at(bias, begin, type), x, end - begin, columns, y + begin);
  });
}

// The squeezed vector before its activation.
void squeeze(const GateWeights& w, const float* pooled, float* u) {
  multiply(w.type, w.down_weight, w.down_bias, pooled, w.squeezed, w.channels, u);
}

}  // namespace

const AttentionKernel& choose_attention() {
#if defined(__x86_64__)
  const Isa best = isa();
  if (best >= Isa::avx512) return avx512::attention;
  if (best >= Isa::avx2) return avx2::attention;
#endif
  return portable::attention;
}

GateWeights gate_weights(const char* op, torch::headeronly::ScalarType type, int64_t channels, const std::optional<Tensor>& down_weight,
                         const std::optional<Tensor>& down_bias, const Tensor& up_weight, const std::optional<Tensor>& up_bias,
                         int64_t gate, int64_t activation) {
  const int64_t squeezed = squeezed_channels(op, type, channels, down_weight, down_bias, up_weight, up_bias, gate, activation);
  const auto data = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; };
  return {channels, squeezed, element_of(type, op), static_cast<Gate>(gate), static_cast<Activation>(activation), data(down_weight),
          down_weight ? data(down_bias) : nullptr, up_weight.const_data_ptr(), data(up_bias)};
}

void gate_forward(const GateWeights& w, const float* pooled, int64_t batch, float* s) {
  Buffer memory;
  float* z = w.down_weight ? static_cast<float*>(memory.reserve(w.squeezed * 4)) : nullptr;
  for (int64_t n = 0; n < batch; ++n, pooled += w.channels, s += w.channels) {
    if (w.down_weight) {
      squeeze(w, pooled, z);
      for (int64_t r = 0; r < w.squeezed; ++r) z[r] = activation_value(w.activation, z[r]);
    }
    multiply(w.type, w.up_weight, w.up_bias, w.down_weight ? z : pooled, w.channels, w.squeezed, s);
    for (int64_t c = 0; c < w.channels; ++c) s[c] = gate_value(w.gate, s[c]);
  }
}

void gate_backward(const GateWeights& w, const GateTape& tape, int64_t n, const float* pooled, const float* s, const float* ds, float* dpooled) {
  const AttentionKernel& kernel = choose_attention();
  const int type = static_cast<int>(w.type);
  float *dv = tape.dv + n * w.channels, *du = tape.du + n * w.squeezed, *z = tape.z + n * w.squeezed;
  for (int64_t c = 0; c < w.channels; ++c) dv[c] = ds[c] * gate_slope(w.gate, s[c]);
  if (!w.down_weight) {
    std::copy_n(pooled, w.channels, z);
    if (dpooled) kernel.multiply_transposed[type](w.up_weight, dv, w.channels, w.channels, dpooled);
    return;
  }
  kernel.multiply_transposed[type](w.up_weight, dv, w.channels, w.squeezed, du);
  squeeze(w, pooled, z);
  for (int64_t r = 0; r < w.squeezed; ++r) {
    du[r] *= activation_slope(w.activation, z[r]);
    z[r] = activation_value(w.activation, z[r]);
  }
  if (dpooled) kernel.multiply_transposed[type](w.down_weight, du, w.squeezed, w.channels, dpooled);
}

void gate_weight_gradients(const GateWeights& w, const GateTape& tape, int64_t batch, const float* pooled, const GateGradients& gradients) {
  const auto outer = choose_attention().outer[static_cast<int>(w.type)];
  if (gradients.up_weight) outer(tape.dv, tape.z, batch, w.channels, w.squeezed, gradients.up_weight, gradients.up_bias);
  if (gradients.down_weight) outer(tape.du, pooled, batch, w.squeezed, w.channels, gradients.down_weight, gradients.down_bias);
}

}  // namespace fastsr::cpu
