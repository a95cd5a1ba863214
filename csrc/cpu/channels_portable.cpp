// Sums and scalings over channels for any processor, and the choice of the instruction set.
#include "cpu/channels.h"

#include "cpu/isa.h"

namespace fastsr::cpu {
namespace portable {

#define FASTSR_LANES 4
#include "cpu/vector.h"
#include "cpu/channels_kernel.h"

}  // namespace portable

const ChannelKernel& choose_channel_kernel() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return avx512::channels;
  if (isa() >= Isa::avx2) return avx2::channels;
#endif
  return portable::channels;
}

}  // namespace fastsr::cpu
