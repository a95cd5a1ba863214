// The gate of channel attention as scalars, for host and device: s = gate(up * activation(down * p + bias) + bias).
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTSR_BOTH __host__ __device__ __forceinline__
#else
#define FASTSR_BOTH inline
#endif

namespace fastsr {

enum class Gate : int64_t { none, sigmoid, hardsigmoid };
enum class Activation : int64_t { relu, silu };

FASTSR_BOTH float sigmoid(float v) { return 1.f / (1.f + expf(-v)); }

// Comparisons are such that a NaN passes through.
FASTSR_BOTH float gate_value(Gate gate, float v) {
  if (gate == Gate::sigmoid) return sigmoid(v);
  if (gate == Gate::none) return v;
  const float line = (v + 3.f) * (1.f / 6.f);
  return line < 0.f ? 0.f : line > 1.f ? 1.f : line;
}

// The gate's derivative, from its value: the clamped ends of hardsigmoid are flat.
FASTSR_BOTH float gate_slope(Gate gate, float s) {
  if (gate == Gate::sigmoid) return s * (1.f - s);
  if (gate == Gate::none) return 1.f;
  return s <= 0.f || s >= 1.f ? 0.f : 1.f / 6.f;
}

FASTSR_BOTH float activation_value(Activation activation, float u) {
  if (activation == Activation::silu) return u * sigmoid(u);
  return u < 0.f ? 0.f : u;
}

FASTSR_BOTH float activation_slope(Activation activation, float u) {
  if (activation == Activation::relu) return u <= 0.f ? 0.f : 1.f;
  const float s = sigmoid(u);
  return s * (1.f + u * (1.f - s));
}

}  // namespace fastsr
