// The nearest-code search for any processor.
#include "cpu/unfused.h"
#include "cpu/vq_engine.h"

namespace fastsr::cpu::portable {

#define FASTSR_LANES 4
#define FASTSR_NAME "portable"
#include "cpu/vector.h"
#include "cpu/vq_kernel.h"

}  // namespace fastsr::cpu::portable
