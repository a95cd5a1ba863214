// What channel attention asks of one instruction set: sums over pixels, scaled copies, and the gate's small matrices.
// No inline code here (see conv_engine.h).
#pragma once
#include <cstdint>

namespace fastsr::cpu {

// A run of pixels as memory has it: `units` groups of values, each as many vectors, of which the last holds `last` values; then the
// first `tail` values of one more group. A group is one pixel or, where pixels lie end to end, as many of them as fill whole vectors.
struct Run {
  int64_t units, vectors, last, tail;
};

// out = factors * x + residual, or + shifts, or neither; factors and shifts hold one value per value of a group.
struct ScaleJob {
  Run run;
  const float *factors, *shifts;
  const void *x, *residual;
  void* out;
  int64_t x_unit, residual_unit, out_unit;  // elements from a group to the next
  bool stream;                              // write around the cache; whole vectors at aligned addresses only
};

struct AttentionKernel {
  int64_t lanes;
  // sums += the values of x, or where g is not null the products of both, each at its place in the group.
  void (*sum[3])(const Run& run, const void* x, int64_t x_unit, const void* g, int64_t g_unit, float* sums);
  void (*scale[3])(const ScaleJob& job);

  // Matrices of the weights' dtype, rows end to end.
  // y[o] = bias[o] + sum over i of w[o][i] * x[i]; the bias may be null.
  void (*multiply[3])(const void* w, const void* bias, const float* x, int64_t rows, int64_t columns, float* y);
  // y[i] = sum over o of w[o][i] * x[o]
  void (*multiply_transposed[3])(const void* w, const float* x, int64_t rows, int64_t columns, float* y);
  // w[o][i] = sum over n of a[n][o] * b[n][i]; bias[o] = sum over n of a[n][o], unless null.
  void (*outer[3])(const float* a, const float* b, int64_t batch, int64_t rows, int64_t columns, void* w, void* bias);
};

namespace portable { extern const AttentionKernel attention; }
#if defined(__x86_64__)
namespace avx2 { extern const AttentionKernel attention; }
namespace avx512 { extern const AttentionKernel attention; }
#endif

}  // namespace fastsr::cpu
