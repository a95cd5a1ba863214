// The 3x3 convolution engine for any processor.
#include "cpu/conv_engine.h"

namespace fastsr::cpu::portable {

#define FASTSR_LANES 4
#include "cpu/vector.h"
#include "cpu/conv_kernel.h"

extern const Kernel float32 = {
    "float32", Element::f32, LANES, VECTORS, 1, LANES / 3,
    {&rows<Floats, float>, &rows<Floats, BFloat16>, &rows<Floats, Half>},
    {&read<float>, &read<BFloat16>, &read<Half>}, nullptr,
};

}  // namespace fastsr::cpu::portable
