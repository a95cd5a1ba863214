// What the kernels of the nearest-code search do with a block's 128 rows before and after the products: measure and round them
// (steps 1 and 2 of vq_search.cuh), and decide with the groups that were kept (step 4). 256 threads, which may be the first of more.
#pragma once

#include "cuda/copy.cuh"
#include "cuda/vq_exact.cuh"
#include "cuda/vq_products.cuh"

namespace fastsr::cuda {

template <class T>
struct Search {
  RowView<T> x;
  CodeView<T> codebook;
  const unsigned char* packed;
  const CodeStatistics* statistics;
  RowList from, to;
  int few;  // lists of `from` that are not longer are left to the scan
  bool cosine;
  Answer answer;
};

// What a row's bound is made of: product_bound, and |x|; rounded up.
struct RowBound {
  float products, norm;
};

// Shared memory of a block. SLABS = 0: one slab that is filled anew for each stage of its depth.
template <class Product, int SLABS>
struct SearchMemory {
  static constexpr int slab_bytes = (SLABS ? SLABS : 1) * Product::slab_bytes;
  static constexpr int work_bytes = slab_bytes + Product::stages(SLABS) * Product::blob_pitch;
  static constexpr int bytes = work_bytes + kVqSide * static_cast<int>(sizeof(int) + sizeof(float) + sizeof(Scale) + (SLABS ? 0 : sizeof(RowBound)));
  static_assert(kVqSide * Product::owners * static_cast<int>(sizeof(Kept<Product::keep>)) <= work_bytes - (Product::refines ? slab_bytes : 0));
  static_assert(sizeof(RowBound) == sizeof(Scale));

  unsigned char* start;
  __device__ __forceinline__ unsigned char* slab(int i) const { return start + i * Product::slab_bytes; }
  __device__ __forceinline__ unsigned char* blob(int i) const { return start + slab_bytes + i % Product::stages(SLABS) * Product::blob_pitch; }
  __device__ __forceinline__ int* rows() const { return reinterpret_cast<int*>(start + work_bytes); }
  __device__ __forceinline__ float* ratios() const { return reinterpret_cast<float*>(rows() + kVqSide); }
  __device__ __forceinline__ Scale* scales() const { return reinterpret_cast<Scale*>(ratios() + kVqSide); }
  // Once the slabs are full, the bounds lie where the scales were.
  __device__ __forceinline__ RowBound* bounds() const { return reinterpret_cast<RowBound*>(scales() + (SLABS ? 0 : kVqSide)); }
  // After the search, the kept groups lie where blobs were, and slabs too where they are not read again.
  __device__ __forceinline__ Kept<Product::keep>* kept(int row) const {
    return reinterpret_cast<Kept<Product::keep>*>(start + (Product::refines ? slab_bytes : 0)) + row * Product::owners;
  }
};

template <class T, class Product, int SLABS>
struct SearchRows {
  using Memory = SearchMemory<Product, SLABS>;
  const Search<T>& call;
  Memory memory;
  int head;

  static __device__ __forceinline__ void sync() { sync_threads<kVqThreads>(); }

  __device__ __forceinline__ const T* values(int row) const { return call.x.at(row, head); }

  // Step 1, two threads a row; both return the bound of row threadIdx.x % 128.
  __device__ __forceinline__ RowBound measure() const {
    const int local = threadIdx.x % kVqSide, part = threadIdx.x / kVqSide, row = memory.rows()[local], depth = call.codebook.depth;
    double* sums = reinterpret_cast<double*>(memory.start);
    float* mosts = reinterpret_cast<float*>(sums + 2 * 3 * kVqSide);
    float most = 0;
    double sum = 0;
    if (row >= 0) measure_vector(most, sum, values(row), call.x.depth_stride, depth, call.x.vectors, part);
    sums[threadIdx.x] = sum, mosts[threadIdx.x] = most;
    sync();
    most = fmaxf(mosts[local], mosts[local + kVqSide]), sum = sums[local] + sums[local + kVqSide];
    sync();
    const int exponent = scaling_exponent(most), shift = exponent - call.statistics[head].exponent;
    const double norm = sum > 0 ? sqrt(sum) : 1.0;
    const Scale scale = call.cosine ? Scale::inverse(norm) : Scale::power(exponent);
    if (part == 0) memory.scales()[local] = scale, memory.ratios()[local] = call.cosine ? 1.0f : ldexpf(1.0f, shift);
    const double exact_scale = call.cosine ? 1.0 / norm : ldexp(1.0, exponent);
    Squares squares{};
    if (row >= 0) {
#pragma unroll 2
      for (int d = part * kVqUnit; d < depth; d += 2 * kVqUnit) {
        float v[kVqUnit];
        load_unit(v, values(row), call.x.depth_stride, d, depth, call.x.vectors);
        squares.add<Product>(v, scale, exact_scale);
      }
    }
    double* mine = sums + threadIdx.x * 3;
    mine[0] = squares.norm, mine[1] = squares.rounded, mine[2] = squares.error;
    sync();
    const double* other = sums + (local + kVqSide) * 3;
    mine = sums + local * 3;
    // A row that is not finite, or a ratio that float32 cannot hold, certifies nothing.
    const bool hopeless = most == INFINITY || (!call.cosine && shift > 127);
    const vq::Operand x{hopeless ? INFINITY : sqrt(mine[0] + other[0]), sqrt(mine[1] + other[1]), sqrt(mine[2] + other[2])};
    const double products = vq::product_bound(depth, Product::accumulation(depth), x, call.statistics[head].operand());
    sync();
    constexpr float kUp = 1.0f + 0x1p-22f;
    return {static_cast<float>(products) * kUp, static_cast<float>(x.norm) * kUp};
  }

  // Step 2 for one slab of 64 values, which begin at `begin`.
  __device__ __forceinline__ void fill(int slab, int begin) const {
    const int local = threadIdx.x % kVqSide, row = memory.rows()[local];
    const Scale scale = memory.scales()[local];
#pragma unroll 2
    for (int d = threadIdx.x / kVqSide * kVqUnit; d < Product::slab_depth; d += 2 * kVqUnit) {
      float v[kVqUnit] = {};
      if (row >= 0) load_unit(v, values(row), call.x.depth_stride, begin + d, call.codebook.depth, call.x.vectors);
#pragma unroll
      for (int i = 0; i < kVqUnit; ++i) v[i] = scale(v[i]);
      Product::put_row(memory.slab(slab), local, d, v);
    }
  }

  // The score of code_of(lane) of a group, by float32 multiply-adds of the rounded values: less wrong than that of tensor cores, so that
  // the same bound holds. Lane u multiplies unit u of every code, 128 bytes of a code at once, and then lanes exchange their sums.
  template <class Code>
  __device__ __forceinline__ float refined(int local, int lane, Code code_of) const {
    const int stages = (call.codebook.depth + Product::depth - 1) / Product::depth, tiles = (call.codebook.codes + kVqSide - 1) / kVqSide;
    const unsigned char* blob = call.packed + (static_cast<int64_t>(head) * tiles + code_of(0) / kVqSide) * stages * Product::blob_bytes;
    const float half = reinterpret_cast<const float*>(blob + Product::blob_bytes)[code_of(lane) % kVqSide - kVqSide];
    float sums[kVqUnit] = {};
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage, blob += Product::blob_bytes) {
      const auto v = *reinterpret_cast<const Pack<__half>*>(memory.slab(stage) + Product::place(local, lane));
#pragma unroll
      for (int i = 0; i < kVqUnit; ++i) {
        const auto w = *reinterpret_cast<const Pack<__half>*>(blob + Product::place(code_of(i) % kVqSide, lane));
#pragma unroll
        for (int d = 0; d < kVqUnit; ++d) sums[i] = fmaf(to_float(v.v[d]), to_float(w.v[d]), sums[i]);
      }
    }
#pragma unroll
    for (int step = kVqUnit / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < step; ++i) {
        const bool upper = lane & step;
        const float given = upper ? sums[i] : sums[i + step];
        sums[i] = (upper ? sums[i + step] : sums[i]) + __shfl_xor_sync(0xffffffffu, given, step);
      }
    }
    return fmaf(half, memory.ratios()[local], -sums[0]);
  }

  // Step 4, eight lanes a row: the codes of its groups within 2 B, after a second look where that is one group, are compared in float64.
  __device__ __forceinline__ void decide() const {
    constexpr int kGroups = Product::owners * Product::keep;
    const vq::Operand codes = call.statistics[head].operand();
    const int depth = call.codebook.depth;
    const int lane = threadIdx.x % kVqUnit;
    unsigned several = 0;
#pragma unroll 1
    for (int local = threadIdx.x / kVqUnit; local < kVqSide; local += kVqThreads / kVqUnit) {
      const int row = memory.rows()[local];
      const Kept<Product::keep>* kept = memory.kept(local);
      const RowBound bound = memory.bounds()[local];
      float least = INFINITY, lost = INFINITY;
      for (int owner = lane; owner < Product::owners; owner += kVqUnit) {
        least = fminf(least, kept[owner].value[0]), lost = fminf(lost, kept[owner].value[Product::keep]);
      }
      for (int step = kVqUnit / 2; step > 0; step /= 2) {
        least = fminf(least, __shfl_xor_sync(0xffffffffu, least, step)), lost = fminf(lost, __shfl_xor_sync(0xffffffffu, lost, step));
      }
      const double ratio = memory.ratios()[local], square = static_cast<double>(bound.norm) * bound.norm;
      const auto limit_of = [&](float score) {
        return score + vq::twice_bound(depth, bound.products, square / (2 * ratio), codes.norm * codes.norm * ratio / 2, score);
      };
      const double limit = limit_of(least);
      const bool certain = limit < INFINITY && !(lost <= limit);
      unsigned candidates = 0;
      if (row >= 0 && certain) {
        for (int i = 0; i < kGroups; ++i) candidates |= unsigned{kept[i / Product::keep].value[i % Product::keep] <= limit} << i;
      }
      const auto code_of = [&](unsigned groups, int i) {  // of the first of several groups
        const int first = max(__ffs(static_cast<int>(groups)) - 1, 0), owner = first / Product::keep;
        return Product::code(owner, kept[owner].group[first % Product::keep], i);
      };
      Nearest best = Nearest::none();
      bool compares = true;  // this lane's codes
      if constexpr (Product::refines && SLABS > 0) {
        const bool alone = __popc(candidates) == 1;
        if (__any_sync(0xffffffffu, alone)) {
          const float score = refined(local, lane, [&](int i) { return code_of(candidates, i); });
          float smallest = score;
          for (int step = kVqUnit / 2; step > 0; step /= 2) smallest = fminf(smallest, __shfl_xor_sync(0xffffffffu, smallest, step));
          compares = !alone || score <= limit_of(smallest);
          const unsigned left = __ballot_sync(0xffffffffu, compares) >> threadIdx.x % 32 / kVqUnit * kVqUnit & 0xff;
          several += lane == 0 && alone && __popc(left) > 1;
          if (alone && __popc(left) == 1 && !call.answer.distances) {
            best.code = code_of(candidates, __ffs(static_cast<int>(left)) - 1);
            candidates = 0;
          }
        }
      }
      several += lane == 0 && __popc(candidates) > 1;
      const ExactVector<T> x{values(max(row, 0)), call.x.depth_stride, call.x.vectors};
      const double norm = candidates ? exact_norm(x, depth, call.cosine) : 1.0;
      for (; __any_sync(0xffffffffu, candidates != 0); candidates &= candidates - 1) {
        if (candidates == 0 || !compares) continue;
        const int code = code_of(candidates, lane);
        if (code >= call.codebook.codes) continue;
        const ExactVector<T> e{call.codebook.at(head, code), 1, call.codebook.vectors};
        const Nearest other{exact_distance(x, norm, e, depth, call.cosine), code};
        if (other.beats(best)) best = other;
      }
      best.reduce(kVqUnit);
      if (lane != 0 || row < 0) continue;
      if (certain) call.answer.write(row, head, best);
      else call.to.add(head, row);
    }
    if (call.answer.rescored && several) atomicAdd(call.answer.rescored, static_cast<unsigned long long>(several));
  }

  // The numbers of the block's rows, -1 behind the last one.
  __device__ __forceinline__ void list(int64_t first, int64_t rows) const {
    for (int i = threadIdx.x; i < kVqSide; i += kVqThreads) {
      memory.rows()[i] = first + i < rows ? static_cast<int>(call.from.row(head, first + i)) : -1;
    }
    sync();
  }

  // Steps 1 and 2, and the bounds in their place.
  __device__ __forceinline__ void prepare() const {
    const RowBound bound = measure();
    for (int i = 0; i < SLABS && i * Product::slab_depth < call.codebook.depth; ++i) fill(i, i * Product::slab_depth);
    if (SLABS) sync();
    if (threadIdx.x < kVqSide) memory.bounds()[threadIdx.x] = bound;
  }

  // Step 4, once nobody reads slabs and blobs any more.
  __device__ __forceinline__ void finish(const Kept<Product::keep> (&kept)[Product::rows]) const {
#pragma unroll
    for (int i = 0; i < Product::rows; ++i) memory.kept(Product::row(i))[Product::owner()] = kept[i];
    sync();
    decide();
  }
};

}  // namespace fastsr::cuda
