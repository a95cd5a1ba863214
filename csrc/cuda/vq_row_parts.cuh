// Rows of vector quantisation and the lanes that share them; sums over a row and over a block.
//
//     channels side by side    | lane 0: c 0..3 | lane 1: c 4..7 | ... |    as many lanes as hold the row, up to a warp
//     pixels side by side      | lane 0: all channels of pixel 0 |          a lane a row, so that neighbours read neighbours
#pragma once

#include "cuda/vq_segments.cuh"

namespace fastsr::cuda {

constexpr int kFour = 4;         // values that a lane loads at once
constexpr int kCountParts = 64;  // blocks that count a mask

// Lanes that share a row, a power of two.
template <class T>
int lanes_of_row(const RowView<T>& x, int depth) {
  int lanes = 1;
  while (x.depth_stride == 1 && lanes < 32 && lanes * kFour < depth) lanes *= 2;
  return lanes;
}

// Over the `lanes` neighbours that share a row.
__device__ __forceinline__ double row_sum(double v, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// The row of this thread, and its lane within it.
struct RowPart {
  int64_t row;
  int first, step;  // values

  __device__ __forceinline__ explicit RowPart(int lanes) {
    const int thread = threadIdx.x;
    row = static_cast<int64_t>(blockIdx.x) * (kVqThreads / lanes) + thread / lanes, first = thread % lanes * kFour, step = lanes * kFour;
  }
};

// The sum of all threads' values, in thread 0.
__device__ __forceinline__ double block_sum(double v) {
  __shared__ double sums[kVqThreads / 32];
  v = row_sum(v, 32);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kVqThreads / 32; ++i) total += sums[i];
  return total;
}

// parts[block] = how many of the block's rows count.
static __global__ void __launch_bounds__(kVqThreads) count_mask(NumberedRows rows, int* parts) {
  double sum = 0;  // exact
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kVqThreads + threadIdx.x; row < rows.count; row += kCountParts * kVqThreads) {
    sum += rows.mask[row];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = static_cast<int>(sum);
}

inline int64_t blocks_of_rows(int64_t rows, int lanes) { return (rows * lanes + kVqThreads - 1) / kVqThreads; }

}  // namespace fastsr::cuda
