// Torch's tensors as the gate of channel attention.
#pragma once

#include "common/channel_attention_args.h"
#include "cuda/attention_gate.cuh"
#include "cuda/tensors.cuh"

namespace fastsr::cuda {

// Checked by squeezed_channels.
template <class T>
GateCall<T> gate_call(const char* op, ScalarType type, int64_t channels, const std::optional<Tensor>& down_weight,
                      const std::optional<Tensor>& down_bias, const Tensor& up_weight, const std::optional<Tensor>& up_bias, int64_t gate,
                      int64_t activation) {
  const int64_t squeezed = squeezed_channels(op, type, channels, down_weight, down_bias, up_weight, up_bias, gate, activation);
  return {static_cast<int>(channels), static_cast<int>(squeezed), static_cast<Gate>(gate), static_cast<Activation>(activation),
          pointer<T>(down_weight), down_weight ? pointer<T>(down_bias) : nullptr, pointer<T>(up_weight), pointer<T>(up_bias)};
}

}  // namespace fastsr::cuda
