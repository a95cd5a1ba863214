// The gate of channel attention on a CPU: from each image's pooled vector to its gate, and back. In float32 but for the weights.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "common/gate.h"
#include "cpu/attention_engine.h"
#include "cpu/conv_driver.h"

namespace fastsr::cpu {

struct GateWeights {
  int64_t channels, squeezed;  // equal without down_weight
  Element type;                // of the weights
  Gate gate;
  Activation activation;
  const void *down_weight, *down_bias, *up_weight, *up_bias;  // contiguous; null for none
};

// Null for a gradient that is not wanted.
struct GateGradients {
  void *down_weight, *down_bias, *up_weight, *up_bias;
};

// Checks the tensors for op `op`; `type` is that of its pictures.
GateWeights gate_weights(const char* op, torch::headeronly::ScalarType type, int64_t channels,
                         const std::optional<torch::stable::Tensor>& down_weight, const std::optional<torch::stable::Tensor>& down_bias,
                         const torch::stable::Tensor& up_weight, const std::optional<torch::stable::Tensor>& up_bias, int64_t gate,
                         int64_t activation);

const AttentionKernel& choose_attention();

// s[n] from pooled[n], each of `channels` values, for `batch` images.
void gate_forward(const GateWeights& weights, const float* pooled, int64_t batch, float* s);

// What the gradients of the weights are made of, for each image: those of the arguments of gate and activation, and z.
struct GateTape {
  float *dv, *du, *z;  // batch x channels, batch x squeezed, batch x squeezed
  static int64_t floats(const GateWeights& weights, int64_t batch) { return batch * (weights.channels + 2 * weights.squeezed); }
  GateTape(const GateWeights& weights, int64_t batch, float* memory)
      : dv(memory), du(dv + batch * weights.channels), z(du + batch * weights.squeezed) {}
};

// Image n alone: fills its part of the tape and, unless null, its dpooled from ds.
void gate_backward(const GateWeights& weights, const GateTape& tape, int64_t n, const float* pooled, const float* s, const float* ds, float* dpooled);

// The weights' gradients from a full tape, in their dtype.
void gate_weight_gradients(const GateWeights& weights, const GateTape& tape, int64_t batch, const float* pooled, const GateGradients& gradients);

}  // namespace fastsr::cpu
