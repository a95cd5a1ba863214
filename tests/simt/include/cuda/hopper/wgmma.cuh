// Host twin of csrc/cuda/hopper/wgmma.cuh. A product reads its operands through their descriptors, and happens when it is waited for:
// the latest time at which hardware may do it. Sums that are read before show their old values.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/hopper/layout.cuh"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/mma.cuh"

namespace fastsr::cuda::hopper {

inline void fence() { __syncwarp(); }

inline void commit() {
  __syncwarp();
  auto& self = simt::running->self();
  self.product_groups.push_back(std::move(self.products));
  self.products.clear();
}

template <int PENDING>
void wait() {
  auto& groups = simt::running->self().product_groups;
  __syncwarp();
  while (groups.size() > PENDING) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
  __syncwarp();
}

template <int PENDING, int COUNT>
void wait(float (&)[COUNT]) {
  wait<PENDING>();
}

// What hardware does with a descriptor: the 16-byte unit `unit` of row `row` of a K-major operand.
inline const unsigned char* operand_unit(uint64_t descriptor, int row, int unit) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
  const uint32_t address = field(0), units = field(16), rows = field(32), mode = descriptor >> 62;
  if (descriptor >> 49 & 7) simt::fail("wgmma: the twin knows no base offset");
  constexpr uint32_t kSpans[] = {16, 128, 64, 32};
  const uint32_t span = kSpans[mode], mask = span / 16 - 1;  // bits 4.. are exchanged by bits 7..
  const uint32_t linear = address + row / 8 * rows + row % 8 * span + unit * (mode == 0 ? units : 16);
  return simt::running->at_shared_address(linear ^ (linear >> 7 & mask) << 4);
}

template <class T>
float operand(const unsigned char* unit, int i) {
  uint32_t bits = 0;
  std::memcpy(&bits, unit + i * sizeof(T), sizeof(T));
  return fragment_element<T>(bits, 0);
}

template <class T, int N>
__attribute__((no_sanitize("undefined"), optimize("O3"))) void multiply_fragment(float* d, uint64_t a, uint64_t b, bool add, int thread) {
  constexpr int kUnit = 16 / sizeof(T), kDepth = 2 * kUnit;
  float left[2][kDepth], right[kDepth];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < kDepth; ++k) left[half][k] = operand<T>(operand_unit(a, fragment_row(thread, 2 * half), k / kUnit), k % kUnit);
  }
  for (int i = 0; i < N / 2; ++i) {
    if (i % 4 >= 2) continue;
    for (int k = 0; k < kDepth; k += kUnit) {
      const unsigned char* unit = operand_unit(b, fragment_column(thread, i), k / kUnit);
      for (int e = 0; e < kUnit; ++e) right[k + e] = operand<T>(unit, e);
    }
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += left[half][k] * right[k];
      float& to = d[i + 2 * half];
      to = add ? to + sum : sum;
    }
  }
}

template <class T, int N>
void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  __syncwarp();
  const int thread = threadIdx.x % 128;
  ++simt::wgmma_calls;
  simt::running->self().products.push_back([=, sums = &d[0]] { multiply_fragment<T, N>(sums, a, b, add, thread); });
}

}  // namespace fastsr::cuda::hopper
