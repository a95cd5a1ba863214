// Weight gradients of 3x3 convolutions for any processor.
#include "cpu/wgrad_engine.h"

namespace fastsr::cpu::portable {

#define FASTSR_LANES 4
#include "cpu/vector.h"
#include "cpu/wgrad_kernel.h"

extern const WeightGradientKernel weight_gradient = {
    "float32", kMaxChannels, kMaxOutputs, BLOCK, &scratch_bytes<Floats>,
    {&run_task<Floats, float>, &run_task<Floats, BFloat16>, &run_task<Floats, Half>},
};

}  // namespace fastsr::cpu::portable
