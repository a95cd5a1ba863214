// Vector quantisation and its gradients: what follows the search of vq_nearest.cuh, memory-bound.
//
//   forward     search    -> indices, distances
//               gather_codes                                       quantized = codebook[index]; |x - quantized|^2 of each block, float64
//               sort_rows, sum_over_codes (vq_segments.cuh)        counts; sums of x
//               mean_loss                                          the blocks' losses in their order / (M D)
//               or, with `fast`, add_rows and join_loss (vq_atomic_sums.cuh) in the place of these two
//   dx          straight_gradient or rotated_gradient              grad (turned) + 2 commitment_grad / (M D) (x - quantized)
//   dcodebook   sort_rows, sum_over_codes; or add_rows             2 codebook_grad / (M D) * sums of (quantized - x)
//
//   a row of gather_codes and of the gradients:
//
//       channels side by side    | lane 0: c 0..3 | lane 1: c 4..7 | ... |    as many lanes as hold the row, up to a warp
//       pixels side by side      | lane 0: all channels of pixel 0 |          a lane a row, four planes at a time
//       (channels first)         | lane 1: all channels of pixel 1 | ...      so that neighbours read neighbours
//
// M, the number of rows that count, is found on the device: nothing waits for the host, and a CUDA graph can hold every call.
//
// Lives in   registers: four values of each operand, float64 sums of a row or a block    L2: the codebook
// Moves      gather: x, quantized, indices once, a code a row from L2; sums: x again, from L2 where it fits;
//            dx: grad, x, quantized, dx once (rotated: three of them twice more, from L1); dcodebook: x and quantized once
// Limit      DRAM bandwidth; for the rotation of rows also 30 float64 operations a value, which GPUs without fast float64 feel
//
// predicted / measured, H100 at 3.35 TB/s, float32, beyond the search:
//   (65536, 1024, 64) forward     34 MB + 17 MB from L2    0.010 + 0.020 ms (vq_segments.cuh) / not measured yet
//   (65536, 1024, 64) dx          67 MB                    0.022 ms / not measured yet
//   (65536, 1024, 64) dcodebook   34 MB                    0.022 ms / not measured yet
#pragma once

#include "cuda/vq_atomic_sums.cuh"
#include "cuda/vq_nearest.cuh"
#include "cuda/vq_segments.cuh"

namespace fastsr::cuda {

constexpr double kSmallestNorm = 1e-12;  // as in fastsr/kernels/vector_quantize/reference.py

// Where a kernel writes: a view's memory is const for all that read.
template <class T>
__device__ __forceinline__ T* writable(const RowView<T>& view) {
  return const_cast<T*>(view.data);
}

// Four values of a vector from value d on; none behind the last.
template <class T>
__device__ __forceinline__ void store_unit(const float (&v)[kFour], T* values, int64_t stride, int d, int depth, bool vectors) {
  if (vectors) {
    Pack<T, kFour> pack;
#pragma unroll
    for (int i = 0; i < kFour; ++i) pack.v[i] = from_float<T>(v[i]);
    *reinterpret_cast<Pack<T, kFour>*>(values + d) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      if (d + i < depth) values[(d + i) * stride] = from_float<T>(v[i]);
    }
  }
}

// losses[block] = the sum of |x - quantized|^2 over the block's rows that count.
template <class T>
__global__ void __launch_bounds__(kVqThreads, 4) gather_codes(RowView<T> x, CodeView<T> codebook, NumberedRows rows, int lanes,
                                                           RowView<T> quantized, double* losses) {
  const RowPart part(lanes);
  double loss = 0;
  if (part.row < rows.count) {
    const int row = static_cast<int>(part.row);
    const T* from = x.data + rows.offset(x, row);
    const T* code = codebook.at(rows.head(row), rows.indices[row]);
    T* to = writable(quantized) + rows.offset(quantized, row);
    const bool counts = !rows.mask || rows.mask[row];
    for (int d = part.first; d < codebook.depth; d += part.step) {
      float v[kFour], q[kFour];
      load_unit(v, from, x.depth_stride, d, codebook.depth, x.vectors);
      load_unit(q, code, 1, d, codebook.depth, codebook.vectors);
      store_unit(q, to, quantized.depth_stride, d, codebook.depth, quantized.vectors);
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        const float difference = v[i] - q[i];
        if (counts) loss += static_cast<double>(difference) * difference;
      }
    }
  }
  loss = block_sum(loss);
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
}

// loss = the sum of the blocks' losses / (M D); one block.
static __global__ void __launch_bounds__(kVqThreads) mean_loss(const double* losses, int64_t count, SortedRows sorted, int depth, float* loss) {
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kVqThreads) sum += losses[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum / sorted.values(depth));
}

template <class T>
struct InputGradient {
  RowView<T> grad;  // data null: none
  RowView<T> x, quantized, dx;
  NumberedRows rows;        // without indices
  const float* commitment;  // its gradient, or null
  const int* counted;       // [kCountParts], null without a mask
  int depth, lanes;

  // 2 commitment_grad / (M D), in every thread.
  __device__ __forceinline__ float pull() const {
    if (!commitment) return 0;
    int64_t kept = counted ? 0 : rows.count;
#pragma unroll 4  // all at once would spill
    for (int i = 0; counted && i < kCountParts; ++i) kept += counted[i];
    return static_cast<float>(2.0 * *commitment / fmax(1.0, static_cast<double>(kept) * depth));
  }
  __device__ __forceinline__ float weight(int row) const { return rows.mask && !rows.mask[row] ? 0.0f : pull(); }
  __device__ __forceinline__ void load(float (&v)[kFour], const RowView<T>& view, int row, int d) const {
    load_unit(v, view.data + rows.offset(view, row), view.depth_stride, d, depth, view.vectors);
  }
  __device__ __forceinline__ void store(const float (&v)[kFour], int row, int d) const {
    store_unit(v, writable(dx) + rows.offset(dx, row), dx.depth_stride, d, depth, dx.vectors);
  }
};

// dx = grad + weight * (x - quantized).
template <class T>
__global__ void __launch_bounds__(kVqThreads) straight_gradient(const __grid_constant__ InputGradient<T> call) {
  const RowPart part(call.lanes);
  if (part.row >= call.rows.count) return;
  const int row = static_cast<int>(part.row);
  const float weight = call.weight(row);
  for (int d = part.first; d < call.depth; d += part.step) {
    float v[kFour] = {};
    if (call.grad.data) call.load(v, call.grad, row, d);
    if (weight != 0) {  // a row that does not count may hold NaN
      float x[kFour], q[kFour];
      call.load(x, call.x, row, d), call.load(q, call.quantized, row, d);
#pragma unroll
      for (int i = 0; i < kFour; ++i) v[i] += weight * (x[i] - q[i]);
    }
    call.store(v, row, d);
  }
}

// dx = |q| / |x| (g - 2 r (r . g) + 2 u (v . g)) + weight * (x - q), with u = x / |x|, v = q / |q|, r = (u + v) / |u + v|: norms, then
// products, then the result.
template <class T>
__global__ void __launch_bounds__(kVqThreads, 3) rotated_gradient(const __grid_constant__ InputGradient<T> call) {
  const RowPart part(call.lanes);
  const bool exists = part.row < call.rows.count;
  const int row = exists ? static_cast<int>(part.row) : 0, depth = exists ? call.depth : 0;
  float x[kFour], q[kFour], g[kFour];
  double xx = 0, qq = 0;
  for (int d = part.first; d < depth; d += part.step) {
    call.load(x, call.x, row, d), call.load(q, call.quantized, row, d);
#pragma unroll
    for (int i = 0; i < kFour; ++i) xx += static_cast<double>(x[i]) * x[i], qq += static_cast<double>(q[i]) * q[i];
  }
  const double x_norm = fmax(sqrt(row_sum(xx, call.lanes)), kSmallestNorm), q_norm = fmax(sqrt(row_sum(qq, call.lanes)), kSmallestNorm);
  const double by_x = 1.0 / x_norm, by_q = 1.0 / q_norm;
  double mm = 0, gm = 0, gv = 0;
  for (int d = part.first; d < depth; d += part.step) {
    call.load(x, call.x, row, d), call.load(q, call.quantized, row, d), call.load(g, call.grad, row, d);
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      const double v = q[i] * by_q, middle = x[i] * by_x + v;
      mm += middle * middle, gm += g[i] * middle, gv += g[i] * v;
    }
  }
  const double norm = fmax(sqrt(row_sum(mm, call.lanes)), kSmallestNorm);
  gm = row_sum(gm, call.lanes) / (norm * norm), gv = row_sum(gv, call.lanes);
  if (!exists) return;
  const float weight = call.weight(row);
  const double scale = q_norm * by_x;
  for (int d = part.first; d < depth; d += part.step) {
    call.load(x, call.x, row, d), call.load(q, call.quantized, row, d), call.load(g, call.grad, row, d);
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      const double u = x[i] * by_x, turned = scale * (g[i] - 2 * (u + q[i] * by_q) * gm + 2 * u * gv);
      g[i] = static_cast<float>(turned + (weight == 0 ? 0.0 : static_cast<double>(weight) * (x[i] - q[i])));
    }
    call.store(g, row, d);
  }
}

// Everything that forward fills, beside what the search does.
template <class T>
struct QuantizeCall {
  RowView<T> x, quantized;
  CodeView<T> codebook;
  NumberedRows rows;
  float* loss;
  int64_t* counts;
  float* sums;  // zeros so far
};

// After the search.
template <class T, class Launch, class Allocate>
void quantize(const QuantizeCall<T>& call, bool fast, const Launch& launch, const Allocate& allocate) {
  const int lanes = lanes_of_row(call.x, call.codebook.depth);
  const int64_t blocks = blocks_of_rows(call.rows.count, lanes);
  auto* losses = static_cast<double*>(allocate(blocks * static_cast<int64_t>(sizeof(double))));
  launch(gather_codes<T>, blocks, kVqThreads, 0, call.x, call.codebook, call.rows, lanes, call.quantized, losses);
  if (fast) {
    const int64_t codes = int64_t{call.rows.heads} * call.rows.codes;
    launch(clear_values<int64_t>, blocks_of_rows(codes, 1), kVqThreads, 0, call.counts, codes);
    launch(add_rows<T>, blocks, kVqThreads, 0, AddRows<T>{call.x, {}, call.rows, call.codebook.depth, lanes, call.sums, call.counts});
    launch(join_loss, 1, kVqThreads, 0, losses, blocks, call.counts, codes, call.codebook.depth, call.loss);
    return;
  }
  const SortedRows sorted = sort_rows(call.rows, call.counts, launch, allocate);
  sum_over_codes<T, float>({call.x, {}, call.rows, sorted, call.codebook.depth, 0, nullptr, nullptr, call.sums}, launch, allocate);
  launch(mean_loss, 1, kVqThreads, 0, losses, blocks, sorted, call.codebook.depth, call.loss);
}

template <class T, class Launch, class Allocate>
void input_gradient(InputGradient<T> call, bool rotation, const Launch& launch, const Allocate& allocate) {
  call.lanes = lanes_of_row(call.x, call.depth);
  if (call.commitment && call.rows.mask) {
    auto* parts = static_cast<int*>(allocate(kCountParts * static_cast<int64_t>(sizeof(int))));
    launch(count_mask, kCountParts, kVqThreads, 0, call.rows, parts);
    call.counted = parts;
  }
  const bool rotated = rotation && call.grad.data;
  launch(rotated ? rotated_gradient<T> : straight_gradient<T>, blocks_of_rows(call.rows.count, call.lanes), kVqThreads, 0, call);
}

// dcodebook (zeros so far) from the sums of (quantized - x).
template <class T, class Launch, class Allocate>
void codebook_gradient(const RowView<T>& x, const RowView<T>& quantized, const NumberedRows& rows, int depth, const float* grad, T* dcodebook,
                       bool fast, const Launch& launch, const Allocate& allocate) {
  if (fast) return add_gradient(x, quantized, rows, depth, grad, dcodebook, launch, allocate);
  auto* counts = static_cast<int64_t*>(allocate(int64_t{rows.heads} * rows.codes * static_cast<int64_t>(sizeof(int64_t))));
  const SortedRows sorted = sort_rows(rows, counts, launch, allocate);
  sum_over_codes<T, T>({x, quantized, rows, sorted, depth, 0, nullptr, grad, dcodebook}, launch, allocate);
}

}  // namespace fastsr::cuda
