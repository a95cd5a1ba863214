// The gate of channel attention: from the partial sums of an image to the factors of its channels, and back, by one block.
//
//     partial sums [strip][channel] -> pooled -> z = activation(down pooled + bias) -> gates = gate(up z + bias)
//     partial sums of g * x         -> dv -> dz = up^T dv, du = dz * activation'    -> shifts = down^T du / pixels
//
// Matrices are read by 1 to 32 lanes a row, so that RCAN's 4 x 64 and 64 x 4 are one step of a block each. The block is one of
// `gate_images`, of the pass over the pixels, or of a cluster; the vectors lie in shared or in global memory accordingly.
#pragma once

#include "common/gate.h"
#include "cuda/numeric.cuh"

namespace fastsr::cuda {

template <class T>
struct GateCall {
  int channels, squeezed;  // equal without down_weight
  Gate gate;
  Activation activation;
  const T *down_weight, *down_bias, *up_weight, *up_bias;  // contiguous; null for none
};

constexpr int kFewChannels = 256;  // of vectors in a block's shared memory

// Float32 vectors, of all images or of one: what is squeezed and the gate; the gradients of the arguments of gate and activation, and
// what the pooling adds to the gradient of each pixel.
struct GateVectors {
  float *pooled, *gates, *z, *dv, *du, *shifts;

  __device__ __forceinline__ GateVectors of_image(int64_t n, int channels, int squeezed) const {
    const auto at = [n](float* p, int length) { return p ? p + n * length : nullptr; };
    return {at(pooled, channels), at(gates, channels), at(z, squeezed), at(dv, channels), at(du, squeezed), at(shifts, channels)};
  }
};

// finish(c, sum of read(i, c) over i < strips) for every channel, always in the same order; `parts` holds kThreads values.
template <int kThreads, class Read, class Finish>
__device__ __forceinline__ void join_strips(Read read, int strips, int channels, float* parts, Finish finish) {
  int wide = 32;
  while (wide < channels && wide < kThreads) wide *= 2;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % wide, part = thread / wide;
  for (int first = 0; first < channels; first += wide) {
    const int c = first + lane;
    float sum = 0.f;
    if (c < channels) {
#pragma unroll 8
      for (int i = part; i < strips; i += kThreads / wide) sum += read(i, c);
    }
    parts[thread] = sum;
    __syncthreads();
    if (part == 0 && c < channels) {
      for (int i = 1; i < kThreads / wide; ++i) sum += parts[i * wide + lane];
      finish(c, sum);
    }
    __syncthreads();
  }
}

// finish(row, sum over i of w[row * row_step + i * step] * x[i]) for all rows.
template <int kThreads, class T, class Finish>
__device__ __forceinline__ void multiply_rows(const T* w, int64_t row_step, int64_t step, const float* x, int rows, int columns, Finish finish) {
  int lanes = 1;
  while (lanes < 32 && lanes * 4 < columns) lanes *= 2;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  for (int first = 0; first < rows; first += kThreads / lanes) {
    const int row = first + static_cast<int>(threadIdx.x) / lanes;
    float sum = 0.f;
    if (row < rows) {
#pragma unroll 4
      for (int i = lane; i < columns; i += lanes) sum += to_float(w[row * row_step + i * step]) * x[i];
    }
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane == 0 && row < rows) finish(row, sum);
  }
}

template <class T>
__device__ __forceinline__ float bias_at(const T* bias, int i) {
  return bias ? to_float(bias[i]) : 0.f;
}

// Fills pooled, z and gates. Others may read them after a barrier.
template <int kThreads, class T, class Read>
__device__ __forceinline__ void gate_forward(const GateCall<T>& g, Read read, int strips, float pixels, const GateVectors& v, float* parts) {
  join_strips<kThreads>(read, strips, g.channels, parts, [&](int c, float sum) { v.pooled[c] = sum / pixels; });
  if (g.down_weight) {
    multiply_rows<kThreads>(g.down_weight, g.channels, 1, v.pooled, g.squeezed, g.channels, [&](int r, float sum) {
      v.z[r] = activation_value(g.activation, sum + bias_at(g.down_bias, r));
    });
    __syncthreads();
  }
  multiply_rows<kThreads>(g.up_weight, g.squeezed, 1, g.down_weight ? v.z : v.pooled, g.channels, g.squeezed,
                          [&](int c, float sum) { v.gates[c] = gate_value(g.gate, sum + bias_at(g.up_bias, c)); });
}

// Fills dv, du, z and shifts from pooled, gates and the sums of g * x times `scale`. Others may read them after a barrier.
template <int kThreads, class T, class Read>
__device__ __forceinline__ void gate_backward(const GateCall<T>& g, Read read, int strips, float scale, float pixels, const GateVectors& v,
                                              float* parts) {
  join_strips<kThreads>(read, strips, g.channels, parts,
                        [&](int c, float sum) { v.dv[c] = sum * scale * gate_slope(g.gate, v.gates[c]); });
  if (!g.down_weight) {
    for (int c = static_cast<int>(threadIdx.x); c < g.channels; c += kThreads) v.z[c] = v.pooled[c];
    multiply_rows<kThreads>(g.up_weight, 1, g.squeezed, v.dv, g.squeezed, g.channels, [&](int c, float sum) { v.shifts[c] = sum / pixels; });
    return;
  }
  multiply_rows<kThreads>(g.up_weight, 1, g.squeezed, v.dv, g.squeezed, g.channels, [&](int r, float sum) { v.du[r] = sum; });
  multiply_rows<kThreads>(g.down_weight, g.channels, 1, v.pooled, g.squeezed, g.channels, [&](int r, float sum) {
    const float u = sum + bias_at(g.down_bias, r);
    v.z[r] = activation_value(g.activation, u);
    v.du[r] *= activation_slope(g.activation, u);  // the same thread wrote it
  });
  __syncthreads();
  multiply_rows<kThreads>(g.down_weight, 1, g.channels, v.du, g.channels, g.squeezed, [&](int c, float sum) { v.shifts[c] = sum / pixels; });
}

constexpr int kGateThreads = 512;  // most strips are added up in 64 steps where there are 64 channels

// A block an image, where every block of the pass over the pixels would have too much to add up.
template <class T, bool kBackward>
__global__ void __launch_bounds__(kGateThreads)
    gate_images(GateCall<T> g, const float* partial, int strips, float scale, float pixels, GateVectors all) {
  __shared__ float parts[kGateThreads];
  const GateVectors v = all.of_image(blockIdx.x, g.channels, g.squeezed);
  const float* sums = partial + static_cast<int64_t>(blockIdx.x) * strips * g.channels;
  const auto read = [&](int i, int c) { return sums[static_cast<int64_t>(i) * g.channels + c]; };
  if constexpr (kBackward) {
    gate_backward<kGateThreads>(g, read, strips, scale, pixels, v, parts);
  } else {
    gate_forward<kGateThreads>(g, read, strips, pixels, v, parts);
  }
}

// weight[o][i] = sum over n of a[n][o] * b[n][i], bias[o] = sum over n of a[n][o]; null for what is not wanted.
template <class T>
struct OuterProduct {
  const float *a, *b;
  int rows, columns;
  T *weight, *bias;
};

constexpr int kOuterThreads = 256;

// A thread an element of either matrix's gradient.
template <class T>
__global__ void __launch_bounds__(kOuterThreads) weight_gradients(OuterProduct<T> first, OuterProduct<T> second, int64_t batch) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * kOuterThreads + threadIdx.x;
  const int64_t of_first = first.weight ? static_cast<int64_t>(first.rows) * first.columns : 0;
  const OuterProduct<T>& p = index < of_first ? first : second;
  if (index >= of_first) index -= of_first;
  if (!p.weight || index >= static_cast<int64_t>(p.rows) * p.columns) return;
  const int64_t o = index / p.columns, i = index % p.columns;
  float sum = 0.f, of_bias = 0.f;
#pragma unroll 4
  for (int64_t n = 0; n < batch; ++n) {
    const float a = p.a[n * p.rows + o];
    sum += a * p.b[n * p.columns + i];
    of_bias += a;
  }
  p.weight[index] = from_float<T>(sum);
  if (p.bias && i == 0) p.bias[o] = from_float<T>(of_bias);
}

}  // namespace fastsr::cuda
