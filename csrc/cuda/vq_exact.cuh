// The distances that define the answer of the nearest-code search, in float64 and in the operator's order of summation, and the
// scan of whole rows by them.
//
//   grid.x = a fixed number of blocks; each takes rows off a list       a thread owns every 256th code of one row
//
// The squares of channels j, j + 8, ... are summed in lane j without fused multiply-adds, then lanes 4..7 are added to 0..3, 2..3
// to 0..1, 1 to 0 (fastsr/kernels/vq_nearest/reference.py): every backend finds these very bits.
//
// Lives in   registers: eight sums    L1: the row    L2: the codebook, K D values a row
// Limit      3 K D float64 operations a row: an H100 does 64 fused or single ones a clock and multiprocessor, other GPUs two. Made
//            for the few rows that no certificate decides: 3 us for a row of K = 1024, D = 64, 132 or more rows at once
#pragma once

#include "cuda/vq_data.cuh"

namespace fastsr::cuda {

struct Nearest {
  double distance;
  int code;

  static __device__ __forceinline__ Nearest none() { return {INFINITY, 0x7fffffff}; }
  // The rule of argmin: NaN is smaller than all, and the lowest code wins among equals.
  __device__ __forceinline__ bool beats(const Nearest& other) const {
    const bool nan = distance != distance, other_nan = other.distance != other.distance;
    if (nan || other_nan) return nan && (!other_nan || code < other.code);
    return distance < other.distance || (distance == other.distance && code < other.code);
  }
  // The best of the lanes whose numbers differ below `width`.
  __device__ __forceinline__ void reduce(int width) {
    for (int step = width / 2; step > 0; step /= 2) {
      const Nearest other{__shfl_xor_sync(0xffffffffu, distance, step), __shfl_xor_sync(0xffffffffu, code, step)};
      if (other.beats(*this)) *this = other;
    }
  }
};

struct Answer {
  int64_t* indices;
  float* distances;              // may be null
  unsigned long long* rescored;  // may be null: rows decided among several candidates, rows compared with every code
  int64_t inner;
  int heads;

  __device__ __forceinline__ void write(int64_t row, int head, const Nearest& best) const {
    const int64_t place = (row / inner * heads + head) * inner + row % inner;
    indices[place] = best.code;
    if (distances) distances[place] = static_cast<float>(best.distance);
  }
};

template <class T>
struct ExactVector {
  const T* values;
  int64_t stride;
  bool vectors;
};

// Sum over the eight lanes, in order.
__device__ __forceinline__ double fold_lanes(const double (&lane)[kVqUnit]) {
  double four[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = __dadd_rn(lane[i], lane[i + 4]);
  return __dadd_rn(__dadd_rn(four[0], four[2]), __dadd_rn(four[1], four[3]));
}

// What the metric divides a vector by.
template <class T>
__device__ __forceinline__ double exact_norm(const ExactVector<T>& x, int depth, bool cosine) {
  if (!cosine) return 1.0;
  double lane[kVqUnit] = {};
  for (int d = 0; d < depth; d += kVqUnit) {
    float v[kVqUnit];
    load_unit(v, x.values, x.stride, d, depth, x.vectors);
#pragma unroll
    for (int i = 0; i < kVqUnit; ++i) lane[i] = __dadd_rn(lane[i], __dmul_rn(v[i], v[i]));
  }
  const double norm = sqrt(fold_lanes(lane));
  return norm == 0 ? 1.0 : norm;
}

template <class T, class Difference>
__device__ __forceinline__ void add_squares(double (&lane)[kVqUnit], const ExactVector<T>& x, const ExactVector<T>& e, int d, int depth,
                                            Difference difference) {
  float v[kVqUnit], w[kVqUnit];
  load_unit(v, x.values, x.stride, d, depth, x.vectors);
  load_unit(w, e.values, e.stride, d, depth, e.vectors);
#pragma unroll
  for (int i = 0; i < kVqUnit; ++i) {
    const double r = difference(v[i], w[i]);
    lane[i] = __dadd_rn(lane[i], __dmul_rn(r, r));
  }
}

template <class T>
__device__ __forceinline__ double exact_distance(const ExactVector<T>& x, double x_norm, const ExactVector<T>& e, int depth, bool cosine) {
  double lane[kVqUnit] = {};
  if (cosine) {
    const double e_norm = exact_norm(e, depth, true);
#pragma unroll 1  // divisions are long, and more of them at once spill
    for (int d = 0; d < depth; d += kVqUnit) {
      add_squares(lane, x, e, d, depth, [=](double v, double w) { return v / x_norm - w / e_norm; });
    }
  } else {
#pragma unroll 2
    for (int d = 0; d < depth; d += kVqUnit) add_squares(lane, x, e, d, depth, [](double v, double w) { return v - w; });
  }
  return fold_lanes(lane);
}

// Rows of `first`, or of `second` where `first` holds more than `few`, are compared with every code.
template <class T>
__global__ void __launch_bounds__(kVqThreads, 2) scan_rows(RowView<T> x, CodeView<T> codebook, bool cosine, RowList first, RowList second,
                                                        int few, Answer answer) {
  __shared__ double distances[kVqThreads / 32];
  __shared__ int codes[kVqThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int head = 0; head < answer.heads; ++head) {
    const RowList list = first.count(head) <= few ? first : second;
    const int64_t count = list.count(head);
    if (blockIdx.x == 0 && threadIdx.x == 0 && answer.rescored) atomicAdd(answer.rescored + 1, static_cast<unsigned long long>(count));
    for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
      const int64_t row = list.row(head, i);
      const ExactVector<T> vector{x.at(row, head), x.depth_stride, x.vectors};
      const double norm = exact_norm(vector, codebook.depth, cosine);
      Nearest best = Nearest::none();
      for (int code = threadIdx.x; code < codebook.codes; code += kVqThreads) {
        const ExactVector<T> e{codebook.at(head, code), 1, codebook.vectors};
        const Nearest other{exact_distance(vector, norm, e, codebook.depth, cosine), code};
        if (other.beats(best)) best = other;
      }
      best.reduce(32);
      if (lane == 0) distances[warp] = best.distance, codes[warp] = best.code;
      __syncthreads();
      if (warp == 0) {
        best = lane < kVqThreads / 32 ? Nearest{distances[lane], codes[lane]} : Nearest::none();
        best.reduce(kVqThreads / 32);
        if (lane == 0) answer.write(row, head, best);
      }
      __syncthreads();
    }
  }
}

}  // namespace fastsr::cuda
