// Channel attention's kernels for any processor.
#include "cpu/attention_engine.h"

namespace fastsr::cpu::portable {

#define FASTSR_LANES 4
#include "cpu/vector.h"
#include "cpu/attention_kernel.h"

extern const AttentionKernel attention = {
    LANES,
    {&sum<float>, &sum<BFloat16>, &sum<Half>},
    {&scale<float>, &scale<BFloat16>, &scale<Half>},
    {&multiply<float>, &multiply<BFloat16>, &multiply<Half>},
    {&multiply_transposed<float>, &multiply_transposed<BFloat16>, &multiply_transposed<Half>},
    {&outer<float>, &outer<BFloat16>, &outer<Half>},
};

}  // namespace fastsr::cpu::portable
