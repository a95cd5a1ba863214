// Host twin of csrc/cuda/mma.cuh: the same functions with the fragment layouts of the PTX manual.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/copy.cuh"

namespace fastsr::cuda {

template <int COUNT, bool TRANSPOSED = false>
void load_matrices(uint32_t (&registers)[COUNT], const void* row) {
  static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4);
  struct Slot {
    const void* row;
    uint32_t* registers;
  } slot{row, registers};
  // Only the first 8 * COUNT lanes name rows.
  if (simt::running->self().lane < 8 * COUNT) simt::running->check_shared("ldmatrix", row, 16, 16);
  simt::running->meet("ldmatrix", 0xffffffffu, &slot, [](const auto& slots) {
    for (int i = 0; i < COUNT; ++i) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], static_cast<Slot*>(slots[8 * i + r])->row, 16);
      for (int lane = 0; lane < simt::kWarp; ++lane) {
        const int g = lane / 4, q = lane % 4;
        const uint32_t low = TRANSPOSED ? matrix[2 * q][g] : matrix[g][2 * q];
        const uint32_t high = TRANSPOSED ? matrix[2 * q + 1][g] : matrix[g][2 * q + 1];
        static_cast<Slot*>(slots[lane])->registers[i] = low | high << 16;
      }
    }
  });
}

template <int COUNT>
void round_to_tf32(uint32_t (&registers)[COUNT]) {
  for (uint32_t& bits : registers) {
    if (std::isfinite(std::bit_cast<float>(bits))) bits = (bits + 0x1000) & ~uint32_t{0x1fff};
  }
}

// Element `i` of the register: two 16-bit values or one tf32, whose low bits the hardware does not see.
template <class T>
float fragment_element(uint32_t bits, int i) {
  if constexpr (std::is_same_v<T, float>) {
    return std::bit_cast<float>(bits & ~uint32_t{0x1fff});
  } else {
    const T value{static_cast<uint16_t>(bits >> 16 * i)};
    if constexpr (std::is_same_v<T, __half>) return __half2float(value);
    else return __bfloat162float(value);
  }
}

struct MmaSlot {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
__attribute__((no_sanitize("undefined", "address"), optimize("O3"))) void mma_of_warp(const std::array<void*, simt::kWarp>& slots) {
  constexpr int kPer = 4 / sizeof(T), kDepth = 8 * kPer;
  float a[16][kDepth], b[kDepth][8], d[16][8] = {};
  for (int lane = 0; lane < simt::kWarp; ++lane) {
    const auto& slot = *static_cast<MmaSlot*>(slots[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int e = 0; e < kPer; ++e) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][i / 2 * 4 * kPer + q * kPer + e] = fragment_element<T>(slot.a[i], e);
      for (int i = 0; i < 2; ++i) b[i * 4 * kPer + q * kPer + e][g] = fragment_element<T>(slot.b[i], e);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < simt::kWarp; ++lane) {
    const auto& slot = *static_cast<MmaSlot*>(slots[lane]);
    for (int i = 0; i < 4; ++i) slot.d[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaSlot slot{d, a, {b0, b1}};
  simt::running->meet("mma.sync", 0xffffffffu, &slot, mma_of_warp<T>);
}

}  // namespace fastsr::cuda
