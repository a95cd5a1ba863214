// What the driver of the weight gradients asks of one instruction set. No inline code here (see conv_engine.h).
#pragma once
#include <cstdint>

#include "cpu/wgrad.h"

namespace fastsr::cpu {

// Some output channels x some input channels x some rows of taps of one convolution's weight gradient, over all pixels.
struct WeightGradientTask {
  GradientView x, g;  // from the first channel of the task on
  int64_t batch, height, width;
  int64_t channels, outputs;
  int64_t first_tap, last_tap;    // rows of taps [first, last) of the three
  void* dweight;                  // of the first output and input channel
  int64_t output_stride;          // elements from an output channel to the next
  void* dbias;                    // of the first output channel; null for none
  bool wide;                      // dweight and dbias are float32
  float scale;
  void* scratch;                  // aligned to a cache line
};

struct WeightGradientKernel {
  const char* name;
  int64_t channels, outputs;  // most that a task may have
  int64_t block;              // channels are worked on in blocks of so many
  int64_t (*scratch_bytes)(const WeightGradientTask&);
  void (*run[3])(const WeightGradientTask&);  // by the tensors' Element
};

namespace portable { extern const WeightGradientKernel weight_gradient; }
#if defined(__x86_64__)
namespace avx2 { extern const WeightGradientKernel weight_gradient; }
namespace avx512 { extern const WeightGradientKernel weight_gradient; }
namespace avx512_bf16 { extern const WeightGradientKernel weight_gradient; }
namespace amx { extern const WeightGradientKernel weight_gradient; }
#endif

}  // namespace fastsr::cpu
