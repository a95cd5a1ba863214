// Sums over the rows of each code by atomic additions, the fast variant of vq_segments.cuh: bits change from run to run. NOT RUN ON
// HARDWARE YET.
//
//   add_rows        lanes share a row as vq_row_parts.cuh says; each adds its values to its code's sums, which lie in L2
//   join_loss       forward: the losses' mean over the rows that were counted
//   finish_sums     gradient: float32 sums * 2 grad / (M D), in x's dtype
//
// Taken      if FASTSR_FAST_SUMS=1 and torch's deterministic mode is off (fastsr/kernels/vector_quantize/compiled.py). `make gpu`, step
//            "sums", compares the two; until then nobody gets it unasked
// Lives in   registers: four values of each operand    L2: 4 K D bytes of sums
// Moves      x (for the gradient also quantized) once; 4 D bytes of additions a row, from sm_90 on 16 bytes at a time
// Limit      L2's atomic units, taken as 32 bytes a clock and slice: 4 us for (65536, 1024, 64). Rows of one code queue up at one place:
//            if one code takes all 65536, some 40 us, where sorting does not care
//
// predicted / measured, H100, (65536, 1024, 64) float32: 0.008 ms, against 0.016 ms of sorting and summing / not measured yet
#pragma once

#include "cuda/vq_row_parts.cuh"

namespace fastsr::cuda {

template <class V>
__global__ void __launch_bounds__(kVqThreads) clear_values(V* values, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kVqThreads + threadIdx.x;
  if (i < count) values[i] = V{};
}

// sums[code] += x, or minuend - x where there is one, for each row that counts; counts[code] += 1 where they are wanted.
template <class T>
struct AddRows {
  RowView<T> x, minuend;  // minuend.data null: none
  NumberedRows numbers;
  int depth, lanes;
  float* sums;      // [codes][depth]
  int64_t* counts;  // or null
};

// Adds the first `exist` of four values.
__device__ __forceinline__ void add_unit(float* to, const float (&v)[kFour], int exist, bool aligned) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (aligned) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if (i < exist) atomicAdd(to + i, v[i]);
  }
}

template <class T>
__global__ void __launch_bounds__(kVqThreads) add_rows(const __grid_constant__ AddRows<T> call) {
  const RowPart part(call.lanes);
  if (part.row >= call.numbers.count) return;
  const int row = static_cast<int>(part.row), key = call.numbers.key(row);
  if (key < 0) return;
  if (call.counts && part.first == 0) atomicAdd(reinterpret_cast<unsigned long long*>(call.counts + key), 1ull);
  float* sums = call.sums + static_cast<int64_t>(key) * call.depth;
  for (int d = part.first; d < call.depth; d += part.step) {
    float v[kFour];
    load_unit(v, call.x.data + call.numbers.offset(call.x, row), call.x.depth_stride, d, call.depth, call.x.vectors);
    if (call.minuend.data) {
      float q[kFour];
      load_unit(q, call.minuend.data + call.numbers.offset(call.minuend, row), call.minuend.depth_stride, d, call.depth, call.minuend.vectors);
#pragma unroll
      for (int i = 0; i < kFour; ++i) v[i] = q[i] - v[i];
    }
    add_unit(sums + d, v, call.depth - d, call.depth % kFour == 0);
  }
}

// loss = the sum of the blocks' losses / (M D), M the sum of the counts; one block.
static __global__ void __launch_bounds__(kVqThreads) join_loss(const double* losses, int64_t blocks, const int64_t* counts, int64_t codes, int depth,
                                                             float* loss) {
  double sum = 0, kept = 0;  // whole numbers are exact
  for (int64_t i = threadIdx.x; i < blocks; i += kVqThreads) sum += losses[i];
  for (int64_t i = threadIdx.x; i < codes; i += kVqThreads) kept += static_cast<double>(counts[i]);
  sum = block_sum(sum);
  __syncthreads();  // block_sum's memory is used again
  kept = block_sum(kept);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum / fmax(1.0, kept * depth));
}

// to = 2 grad / (M D) * sums, M the rows or, where a mask was counted in parts, their sum.
template <class T>
__global__ void __launch_bounds__(kVqThreads) finish_sums(const float* sums, int64_t values, const float* grad, int rows, const int* parts, int depth,
                                                          T* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kVqThreads + threadIdx.x;
  if (i >= values) return;
  int64_t kept = parts ? 0 : rows;
#pragma unroll 4  // as InputGradient::pull
  for (int p = 0; parts && p < kCountParts; ++p) kept += parts[p];
  const double factor = 2.0 * *grad / fmax(1.0, static_cast<double>(kept) * depth);
  to[i] = from_float<T>(static_cast<float>(factor * sums[i]));
}

// to = 2 grad / (M D) * sums of (quantized - x) over the rows of each code.
template <class T, class Launch, class Allocate>
void add_gradient(const RowView<T>& x, const RowView<T>& quantized, const NumberedRows& rows, int depth, const float* grad, T* to,
                  const Launch& launch, const Allocate& allocate) {
  const int64_t values = int64_t{rows.heads} * rows.codes * depth;
  auto* sums = static_cast<float*>(allocate(values * static_cast<int64_t>(sizeof(float))));
  int* parts = nullptr;
  if (rows.mask) {
    parts = static_cast<int*>(allocate(kCountParts * static_cast<int64_t>(sizeof(int))));
    launch(count_mask, kCountParts, kVqThreads, 0, rows, parts);
  }
  const int lanes = lanes_of_row(x, depth);
  launch(clear_values<float>, blocks_of_rows(values, 1), kVqThreads, 0, sums, values);
  launch(add_rows<T>, blocks_of_rows(rows.count, lanes), kVqThreads, 0, AddRows<T>{x, quantized, rows, depth, lanes, sums, nullptr});
  launch(finish_sums<T>, blocks_of_rows(values, 1), kVqThreads, 0, sums, values, grad, rows.count, parts, depth, to);
}

}  // namespace fastsr::cuda
