// The instruction sets that the CPU kernels are compiled for, and the one in use.
#pragma once
#include <string>

namespace fastsr::cpu {

enum class Isa { portable, avx2, avx512, avx512_bf16, amx };  // each includes those before it

// The best instruction set that processor, operating system and limit allow; throws if FASTSR_CPU_ISA names none.
Isa isa();

}  // namespace fastsr::cpu
