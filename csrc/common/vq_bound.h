// The certificate of the nearest-code search on GPUs: how far a computed score may lie from the true one. (On a CPU,
// csrc/cpu/vq_search.cpp subtracts a mean and rounds once, which gives other terms; its bound stands there.)
//
// The score s_k = |e_k|^2 / 2 - x . e_k orders the codes of a row x as |x - e_k|^2 does. A search knows x' and e'_k only (x and e_k
// times powers of two, rounded), adds their products up in float32, and finds s'_k. By Cauchy and Schwarz
//
//     |s'_k - s_k| <= B =  |x - x'| max|e'| + |x| max|e - e'|        rounding of the operands
//                        + c_D |x'| max|e'|                          rounding of the D sums
//                        + D 2^-149                                  products below the normal range
//                        + 2^-24 (max|e|^2 / 2 + |s'_1|)             |e|^2 / 2 in float32, and the last subtraction
//                        + (D + 4) 2^-53 (|x|^2 / 2 + |s'_1|)        float64's own rounding in the distances that define the answer
//
// with s'_1 the least score found. The answer is among the codes with s'_k <= s'_1 + 2 B; all of them are compared in float64.
// Source of the tensor cores' c_D: arXiv 2512.07004 and Blanchard et al., SISC 42(3), 2020, C124, taken conservatively, since
// it was not validated on hardware yet.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTSR_HOST_DEVICE __host__ __device__
#else
#define FASTSR_HOST_DEVICE
#endif

namespace fastsr::vq {

constexpr double kFloatUnit = 0x1p-24;   // half a unit in the last place of float32
constexpr double kDoubleUnit = 0x1p-53;  // of float64

// c_D of `depth` fused multiply-adds in float32, in any order and grouping; infinite where the formula ends.
FASTSR_HOST_DEVICE inline double fma_error(int64_t depth) {
  const double sum = static_cast<double>(depth + 1) * kFloatUnit;
  return sum < 0.5 ? sum / (1.0 - sum) : INFINITY;
}

// c_D of tensor cores, which cut off instead of rounding.
FASTSR_HOST_DEVICE inline double tensor_core_error(int64_t depth) { return 1.5 * static_cast<double>(depth + 16) * (2.0 * kFloatUnit); }

// A row x, or the largest values over all codes.
struct Operand {
  double norm;     // |x|, max|e|
  double rounded;  // |x'|, max|e'|
  double error;    // |x - x'|, max|e - e'|
};

// The part of B that does not depend on the scores; infinite or NaN where anything is.
FASTSR_HOST_DEVICE inline double product_bound(int64_t depth, double accumulation, const Operand& x, const Operand& codes) {
  return x.error * codes.rounded + x.norm * codes.error + accumulation * x.rounded * codes.rounded + static_cast<double>(depth) * 0x1p-149;
}

// 2 B in the units of the scores. `half_x` and `half_codes` are |x|^2 / 2 and max|e|^2 / 2 in those units, `least` is s'_1.
FASTSR_HOST_DEVICE inline double twice_bound(int64_t depth, double products, double half_x, double half_codes, double least) {
  // For what is left out above: rounding of the norms and of B itself, |s'_k| in place of |s'_1|.
  constexpr double kSlack = 1.0 + 0x1p-10;
  const double size = least < 0 ? -least : least;
  return 2.0 * kSlack * (products + kFloatUnit * (half_codes + size) + static_cast<double>(depth + 4) * kDoubleUnit * (half_x + size));
}

}  // namespace fastsr::vq
