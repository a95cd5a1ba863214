// What the nearest-code search reads and hands on: rows, codebook, lists of rows, and the packed codebook with its statistics.
//
// A head's codebook is packed once per call into blobs, one per tile of 128 codes and stage of the depth, in the order in which
// the search reads them: blob number tile * stages + stage. A blob is the image of a stage of shared memory, so that staging
// is a linear copy:
//
//     blob   [ 128 codes x DEPTH scaled, rounded values, placed as Product says | |e|^2 / 2 of the 128 codes, float32 ]
//
// Codes behind the last one are zero and have |e|^2 / 2 = inf; values behind the last of a code are zero.
#pragma once

#include <cstdint>

#include "common/vq_bound.h"
#include "cuda/numeric.cuh"

namespace fastsr::cuda {

constexpr int kVqThreads = 256;
constexpr int kVqSide = 128;     // rows and codes of a tile
constexpr int kVqUnit = 8;       // values that a thread stages at once; codes of a group
constexpr int kRangeParts = 64;  // partial maxima of a codebook

// Rows of x (outer, heads, depth, inner): row outer * inner_size + inner of a head.
template <class T>
struct RowView {
  const T* data;
  int64_t inner;  // size
  int64_t outer_stride, head_stride, depth_stride, inner_stride;
  bool vectors;  // four values of a row are one aligned load

  __device__ __forceinline__ const T* at(int64_t row, int64_t head) const {
    return data + row / inner * outer_stride + row % inner * inner_stride + head * head_stride;
  }
};

// A contiguous (heads, codes, depth) codebook.
template <class T>
struct CodeView {
  const T* data;
  int codes, depth;
  bool vectors;

  __device__ __forceinline__ const T* at(int64_t head, int64_t code) const { return data + (head * codes + code) * depth; }
};

// Rows that one kernel leaves to another. Without a list, all rows.
struct RowList {
  int* rows;         // [heads][row_count]; null for all
  unsigned* counts;  // [heads]
  int64_t row_count;

  __device__ __forceinline__ int64_t count(int head) const { return rows ? counts[head] : row_count; }
  __device__ __forceinline__ int64_t row(int head, int64_t i) const { return rows ? rows[head * row_count + i] : i; }
  __device__ __forceinline__ void add(int head, int64_t row) const {
    rows[head * row_count + atomicAdd(counts + head, 1u)] = static_cast<int>(row);
  }
};

// Largest values over one head's codes, as the bits of float64: those of positive numbers are ordered as the numbers.
struct CodeStatistics {
  unsigned long long norm, rounded, error;  // |e|, |e'|, |e - e'|
  int exponent;                             // codes were multiplied by 2^exponent

  __device__ __forceinline__ vq::Operand operand() const {
    return {__longlong_as_double(norm), __longlong_as_double(rounded), __longlong_as_double(error)};
  }
};

constexpr float kLargest = 3.402823466e38f;

// The power of two that brings `most` into [1/2, 1); 0 for zero and for what is not finite.
__device__ __forceinline__ int scaling_exponent(float most) {
  int exponent = 0;
  if (most > 0 && most <= kLargest) frexpf(most, &exponent);
  return -exponent;
}

// How a vector is brought near 1: times a power of two, or divided by its norm. Two factors, since one may leave float32's range.
struct Scale {
  float first, second;

  static __device__ __forceinline__ Scale power(int exponent) {
    return {ldexpf(1.0f, exponent / 2), ldexpf(1.0f, exponent - exponent / 2)};
  }
  static __device__ __forceinline__ Scale inverse(double norm) {
    int exponent = 0;
    const double part = norm > 0 && norm < INFINITY ? frexp(norm, &exponent) : 1.0;
    const Scale scale = power(-exponent);
    return {scale.first, scale.second / static_cast<float>(part)};
  }
  __device__ __forceinline__ float operator()(float v) const { return v * first * second; }
};

// COUNT values (a multiple of four) of a vector from value d on; zeros behind the last.
template <int COUNT, class T>
__device__ __forceinline__ void load_unit(float (&v)[COUNT], const T* values, int64_t stride, int d, int depth, bool vectors) {
  if (vectors) {
#pragma unroll
    for (int four = 0; four < COUNT; four += 4) {
      Pack<T, 4> pack{};
      if (d + four < depth) pack = *reinterpret_cast<const Pack<T, 4>*>(values + d + four);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[four + i] = to_float(pack.v[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] = d + i < depth ? to_float(values[(d + i) * stride]) : 0.0f;
  }
}

// Largest magnitude (infinite if anything is not finite) and sum of squares of every second unit of a vector, from unit `part` on.
template <class T>
__device__ __forceinline__ void measure_vector(float& most, double& sum, const T* values, int64_t stride, int depth, bool vectors, int part) {
#pragma unroll 2
  for (int d = part * kVqUnit; d < depth; d += 2 * kVqUnit) {
    float v[kVqUnit];
    load_unit(v, values, stride, d, depth, vectors);
#pragma unroll
    for (int i = 0; i < kVqUnit; ++i) {
      most = fabsf(v[i]) <= kLargest ? fmaxf(most, fabsf(v[i])) : INFINITY;
      sum += static_cast<double>(v[i]) * v[i];
    }
  }
}

// |x|^2, |x'|^2 and |x - x'|^2, of which a thread adds up a part.
struct Squares {
  double norm, rounded, error;

  // v: eight unscaled values; exact_scale: what makes them x.
  template <class Product>
  __device__ __forceinline__ void add(const float (&v)[kVqUnit], Scale scale, double exact_scale) {
#pragma unroll
    for (int i = 0; i < kVqUnit; ++i) {
      const double exact = v[i] * exact_scale, near = Product::rounded(scale(v[i]));
      norm += exact * exact, rounded += near * near, error += (exact - near) * (exact - near);
    }
  }
};

// The largest magnitude of each codebook in parts; infinite if anything is not finite. Also empties the `count` lists and
// statistics to which later kernels add.
template <class T>
__global__ void __launch_bounds__(kVqThreads) code_range(CodeView<T> codebook, float* parts, CodeStatistics* statistics, unsigned* counters,
                                                         int count) {
  __shared__ float most_of[kVqThreads];
  const int64_t head = blockIdx.x / kRangeParts, part = blockIdx.x % kRangeParts;
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < count; i += kVqThreads) counters[i] = 0, statistics[i] = CodeStatistics{};
  }
  const int64_t size = static_cast<int64_t>(codebook.codes) * codebook.depth;
  const T* values = codebook.at(head, 0);
  float most = 0;
#pragma unroll 4
  for (int64_t i = part * kVqThreads + threadIdx.x; i < size; i += kRangeParts * kVqThreads) {
    const float v = fabsf(to_float(values[i]));
    most = v <= kLargest ? fmaxf(most, v) : INFINITY;  // NaN too is not <=
  }
  most_of[threadIdx.x] = most;
  __syncthreads();
  for (int step = kVqThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) most_of[threadIdx.x] = fmaxf(most_of[threadIdx.x], most_of[threadIdx.x + step]);
    __syncthreads();
  }
  if (threadIdx.x == 0) parts[blockIdx.x] = most_of[0];
}

// The packed codebook; a block per head and tile, two threads a code. Does nothing where `from` lists at most `few` rows.
template <class Product, class T>
__global__ void __launch_bounds__(kVqThreads) pack_codes(CodeView<T> codebook, const float* parts, unsigned char* packed, int stages,
                                                         CodeStatistics* statistics, bool cosine, RowList from, int few) {
  __shared__ double sums[kVqSide], others[3][kVqSide];
  const int tiles = (codebook.codes + kVqSide - 1) / kVqSide;
  const int head = blockIdx.x / tiles, tile = blockIdx.x % tiles, local = threadIdx.x % kVqSide, part = threadIdx.x / kVqSide;
  if (from.rows && from.count(head) <= few) return;
  float range = 0;
  for (int i = 0; i < kRangeParts; ++i) range = fmaxf(range, parts[head * kRangeParts + i]);
  const int code = tile * kVqSide + local, depth = code < codebook.codes ? codebook.depth : 0;
  const T* values = codebook.at(head, min(code, codebook.codes - 1));
  const int exponent = cosine ? 0 : scaling_exponent(range);
  Scale scale = Scale::power(exponent);
  double exact_scale = ldexp(1.0, exponent);
  if (cosine) {
    float most = 0;
    double sum = 0;
    measure_vector(most, sum, values, 1, depth, codebook.vectors, part);
    if (part == 1) sums[local] = sum;
    __syncthreads();
    if (part == 0) sums[local] += sum;
    __syncthreads();
    const double norm = sums[local] > 0 ? sqrt(sums[local]) : 1.0;
    scale = Scale::inverse(norm), exact_scale = 1.0 / norm;
  }
  unsigned char* blobs = packed + (static_cast<int64_t>(head) * tiles + tile) * stages * Product::blob_bytes;
  Squares squares{};
  for (int d = part * kVqUnit; d < stages * Product::depth; d += 2 * kVqUnit) {
    float v[kVqUnit];
    load_unit(v, values, 1, d, depth, codebook.vectors);
    squares.add<Product>(v, scale, exact_scale);
#pragma unroll
    for (int i = 0; i < kVqUnit; ++i) v[i] = scale(v[i]);
    Product::put_codes(blobs + static_cast<int64_t>(d / Product::depth) * Product::blob_bytes, local, d % Product::depth, v);
  }
  if (part == 1) others[0][local] = squares.norm, others[1][local] = squares.rounded, others[2][local] = squares.error;
  __syncthreads();
  if (part == 1) return;
  const double norm = squares.norm + others[0][local];
  for (int stage = 0; stage < stages; ++stage) {
    float* halves = reinterpret_cast<float*>(blobs + static_cast<int64_t>(stage + 1) * Product::blob_bytes) - kVqSide;
    halves[local] = code < codebook.codes ? static_cast<float>(norm / 2) : INFINITY;
  }
  // A codebook that is not finite certifies nothing.
  double values_of[3] = {range < INFINITY ? sqrt(norm) : INFINITY, sqrt(squares.rounded + others[1][local]),
                         sqrt(squares.error + others[2][local])};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    for (int step = 16; step > 0; step /= 2) values_of[i] = fmax(values_of[i], __shfl_xor_sync(0xffffffffu, values_of[i], step));
  }
  if (local % 32 == 0) {
    atomicMax(&statistics[head].norm, static_cast<unsigned long long>(__double_as_longlong(values_of[0])));
    atomicMax(&statistics[head].rounded, static_cast<unsigned long long>(__double_as_longlong(values_of[1])));
    atomicMax(&statistics[head].error, static_cast<unsigned long long>(__double_as_longlong(values_of[2])));
    statistics[head].exponent = exponent;
  }
}

}  // namespace fastsr::cuda
