// Finds the processor's instruction sets once; FASTSR_CPU_ISA and set_cpu_isa lower the limit.
#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastsr::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int kCount = 5;

#if defined(__x86_64__)

// The kernel maps tile registers only for processes that ask.
bool amx_permitted() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  unsigned a, b, c, d, b7, c7, d7, a71 = 0, unused;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::portable;
  const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return Isa::portable;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &unused, &unused, &unused);
  unsigned low, high;  // the register state that the operating system saves
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const auto saves = [&](unsigned mask) { return (low & mask) == mask; };
  const auto ebx7 = [&](int bit) { return (b7 >> bit & 1) != 0; };
  if (!(fma && f16c && ebx7(5) && saves(0x6))) return Isa::portable;
  const bool avx512 = ebx7(16) && ebx7(17) && ebx7(30) && ebx7(31);  // F, DQ, BW, VL
  if (!(avx512 && saves(0xe6))) return Isa::avx2;
  if (!(a71 >> 5 & 1)) return Isa::avx512;
  const bool amx = (d7 >> 22 & 1) && (d7 >> 24 & 1);  // BF16, TILE
  return amx && saves(0x60000) && amx_permitted() ? Isa::amx : Isa::avx512_bf16;
}

#else

Isa detect() { return Isa::portable; }

#endif

Isa detected() {
  static const Isa found = detect();
  return found;
}

std::string names(const char* separator, const char* quote) {
  std::string all;
  for (int i = static_cast<int>(detected()); i >= 0; --i) {
    all += (all.empty() ? "" : separator) + (quote + std::string(kNames[i]) + quote);
  }
  return all;
}

int index_of(const char* name) {
  for (int i = 0; i < kCount; ++i) {
    if (!std::strcmp(name, kNames[i])) return i;
  }
  return -1;
}

Isa from_environment() {
  const char* name = std::getenv("FASTSR_CPU_ISA");
  if (!name || !*name) return detected();
  const int limit = index_of(name);
  STD_TORCH_CHECK(limit >= 0, "FASTSR_CPU_ISA is '", name, "'; this processor offers ", names(", ", "'"));
  return std::min(static_cast<Isa>(limit), detected());
}

std::atomic<Isa>& limit() {
  static std::atomic<Isa> value{from_environment()};
  return value;
}

std::string cpu_isa() { return kNames[static_cast<int>(isa())]; }

void set_cpu_isa(std::string name) {
  const int wanted = index_of(name.c_str());
  STD_TORCH_CHECK(wanted >= 0 && wanted <= static_cast<int>(detected()), "set_cpu_isa: isa is '", name,
                  "'; this processor offers ", names(", ", "'"));
  limit() = static_cast<Isa>(wanted);
}

#define FASTSR_TEXT_(x) #x
#define FASTSR_TEXT(x) FASTSR_TEXT_(x)
#if defined(__clang__)
#define FASTSR_COMPILER "clang " __clang_version__
#else
#define FASTSR_COMPILER "gcc " FASTSR_TEXT(__GNUC__) "." FASTSR_TEXT(__GNUC_MINOR__)
#endif

std::string build_info() {
  std::string cuda = "null", archs = "null";
#if defined(FASTSR_CUDA_VERSION)
  cuda = "\"" FASTSR_CUDA_VERSION "\"";
  archs = "\"" FASTSR_CUDA_ARCHS "\"";
#endif
  return "{\"version\": \"" FASTSR_VERSION "\", \"compiler\": \"" FASTSR_COMPILER "\", \"cuda\": " + cuda +
         ", \"cuda_archs\": " + archs + ", \"cpu_isas\": [" + names(", ", "\"") + "]}";
}

}  // namespace

Isa isa() { return limit(); }

}  // namespace fastsr::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsr, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&fastsr::cpu::build_info));
  m.impl("cpu_isa", TORCH_BOX(&fastsr::cpu::cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&fastsr::cpu::set_cpu_isa));
}
