// The certified nearest-code search over rows and a packed codebook: one pass over all codes, then the candidates in float64.
//
//   grid.x = heads * tiles of 128 rows
//
//                  codes, in tiles of 128 (their blobs stream through two stages)
//                 +--------+--------+--------+----            1. read the rows: largest magnitude, norms, rounding error
//            128  | scores | scores |        | ...            2. put them into the slab, scaled and rounded
//           rows  |        |        |        |                3. for each tile: products, s' = |e|^2/2 - x.e, best groups of 8
//     (the slabs) +--------+--------+--------+----            4. of each row: s'_1 and B; groups within 2 B are compared in float64
//                  kept: the best groups of each owner           by 8 lanes, one code each; a row of which a group within 2 B was
//                                                                not kept, or that is not finite, goes to the list
//
// Lives in   registers: 64 sums and the kept groups    shared: SLABS x 64 values of 128 rows, two blobs (vq_data.cuh), scales
//            L2: the packed codebook, read once by each block
// SLABS = 0 serves longer rows: one slab, filled anew for each tile and 64 values, from L2.
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
  static constexpr int work_bytes = slab_bytes + Product::stages * Product::blob_bytes;
  static constexpr int bytes = work_bytes + kVqSide * static_cast<int>(sizeof(int) + sizeof(float) + sizeof(Scale) + (SLABS ? 0 : sizeof(RowBound)));
  static_assert(kVqSide * Product::owners * static_cast<int>(sizeof(Kept<Product::keep>)) <= work_bytes);
  static_assert(sizeof(RowBound) == sizeof(Scale));

  unsigned char* start;
  __device__ __forceinline__ unsigned char* slab(int i) const { return start + i * Product::slab_bytes; }
  __device__ __forceinline__ unsigned char* blob(int i) const { return start + slab_bytes + i % Product::stages * Product::blob_bytes; }
  __device__ __forceinline__ int* rows() const { return reinterpret_cast<int*>(start + work_bytes); }
  __device__ __forceinline__ float* ratios() const { return reinterpret_cast<float*>(rows() + kVqSide); }
  __device__ __forceinline__ Scale* scales() const { return reinterpret_cast<Scale*>(ratios() + kVqSide); }
  // Once the slabs are full, the bounds lie where the scales were.
  __device__ __forceinline__ RowBound* bounds() const { return reinterpret_cast<RowBound*>(scales() + (SLABS ? 0 : kVqSide)); }
  // After the search, the kept groups lie where slabs and blobs were.
  __device__ __forceinline__ Kept<Product::keep>* kept(int row) const {
    return reinterpret_cast<Kept<Product::keep>*>(start) + row * Product::owners;
  }
};

template <class T, class Product, int SLABS>
struct SearchBlock {
  using Memory = SearchMemory<Product, SLABS>;
  const Search<T>& call;
  Memory memory;
  int head, stages;  // of the depth

  __device__ __forceinline__ const T* values(int row) const { return call.x.at(row, head); }

  __device__ __forceinline__ void stage(const unsigned char* packed, int i) const {
    const unsigned char* from = packed + static_cast<int64_t>(i) * Product::blob_bytes;
    for (int at = threadIdx.x * 16; at < Product::blob_bytes; at += kVqThreads * 16) copy_async_16(memory.blob(i) + at, from + at, 16);
  }

  // Step 1, two threads a row; both return the bound of row threadIdx.x % 128.
  __device__ __forceinline__ RowBound measure() const {
    const int local = threadIdx.x % kVqSide, part = threadIdx.x / kVqSide, row = memory.rows()[local], depth = call.codebook.depth;
    double* sums = reinterpret_cast<double*>(memory.start);
    float* mosts = reinterpret_cast<float*>(sums + 2 * 3 * kVqSide);
    float most = 0;
    double sum = 0;
    if (row >= 0) measure_vector(most, sum, values(row), call.x.depth_stride, depth, call.x.vectors, part);
    sums[threadIdx.x] = sum, mosts[threadIdx.x] = most;
    __syncthreads();
    most = fmaxf(mosts[local], mosts[local + kVqSide]), sum = sums[local] + sums[local + kVqSide];
    __syncthreads();
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
    __syncthreads();
    const double* other = sums + (local + kVqSide) * 3;
    mine = sums + local * 3;
    // A row that is not finite, or a ratio that float32 cannot hold, certifies nothing.
    const bool hopeless = most == INFINITY || (!call.cosine && shift > 127);
    const vq::Operand x{hopeless ? INFINITY : sqrt(mine[0] + other[0]), sqrt(mine[1] + other[1]), sqrt(mine[2] + other[2])};
    const double products = vq::product_bound(depth, Product::accumulation(depth), x, call.statistics[head].operand());
    __syncthreads();
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

  // Step 3.
  __device__ __forceinline__ void search(Kept<Product::keep> (&kept)[Product::rows], const unsigned char* packed, int count) const {
    const int depth = call.codebook.depth;
    Product product;
    int tile = 0, begin = 0;  // the first value of the stage
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      wait_copies<Product::stages - 2>();
      // The blob is there for every thread, and the one before it, and its slab, are read no more.
      __syncthreads();
      if (i + Product::stages - 1 < count) stage(packed, i + Product::stages - 1);
      commit_copies();
      if (SLABS == 0 && begin % Product::slab_depth == 0) {
        fill(0, begin);
        __syncthreads();
      }
      if (begin == 0) product.clear();
      product.multiply(memory.slab(SLABS ? begin / Product::slab_depth : 0), begin % Product::slab_depth, memory.blob(i), depth - begin);
      begin += Product::depth;
      if (begin >= depth) {
        product.fold(kept, memory.ratios(), reinterpret_cast<const float*>(memory.blob(i) + Product::blob_bytes) - kVqSide, tile);
        ++tile, begin = 0;
      }
    }
    __syncthreads();
  }

  // Step 4, eight lanes a row.
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
      const double twice = vq::twice_bound(depth, bound.products, square / (2 * ratio), codes.norm * codes.norm * ratio / 2, least);
      const double limit = least + twice;
      const bool certain = limit < INFINITY && !(lost <= limit);
      unsigned candidates = 0;
      if (row >= 0 && certain) {
        for (int i = 0; i < kGroups; ++i) candidates |= unsigned{kept[i / Product::keep].value[i % Product::keep] <= limit} << i;
      }
      several += lane == 0 && __popc(candidates) > 1;
      const ExactVector<T> x{values(max(row, 0)), call.x.depth_stride, call.x.vectors};
      const double norm = candidates ? exact_norm(x, depth, call.cosine) : 1.0;
      Nearest best = Nearest::none();
      for (; __any_sync(0xffffffffu, candidates != 0); candidates &= candidates - 1) {
        if (candidates == 0) continue;
        const int i = __ffs(static_cast<int>(candidates)) - 1, owner = i / Product::keep;
        const int code = Product::code(owner, kept[owner].group[i % Product::keep], lane);
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

  __device__ __forceinline__ void run(int64_t first, int64_t rows) const {
    const int tiles = (call.codebook.codes + kVqSide - 1) / kVqSide, count = tiles * stages;
    const unsigned char* packed = call.packed + static_cast<int64_t>(head) * count * Product::blob_bytes;
    for (int i = threadIdx.x; i < kVqSide; i += kVqThreads) {
      memory.rows()[i] = first + i < rows ? static_cast<int>(call.from.row(head, first + i)) : -1;
    }
    // The first blobs are under way meanwhile; rows are measured where their slab will lie.
#pragma unroll
    for (int i = 0; i < Product::stages - 1; ++i) {
      if (i < count) stage(packed, i);
      commit_copies();
    }
    __syncthreads();
    const RowBound bound = measure();
    for (int i = 0; i < SLABS && i * Product::slab_depth < call.codebook.depth; ++i) fill(i, i * Product::slab_depth);
    if (SLABS) __syncthreads();
    if (threadIdx.x < kVqSide) memory.bounds()[threadIdx.x] = bound;
    Kept<Product::keep> kept[Product::rows];
#pragma unroll
    for (auto& row : kept) row.clear();
    search(kept, packed, count);
#pragma unroll
    for (int i = 0; i < Product::rows; ++i) memory.kept(Product::row(i))[Product::owner()] = kept[i];
    __syncthreads();
    decide();
  }
};

// A block per head and 128 rows; where the rows come from a list, those behind its end have nothing to do.
template <class Product, int SLABS, class T>
__global__ void __launch_bounds__(kVqThreads, Product::blocks(SLABS)) search_rows(const __grid_constant__ Search<T> call) {
  const unsigned tiles = gridDim.x / call.answer.heads;
  const int head = blockIdx.x / tiles;
  const int64_t first = static_cast<int64_t>(blockIdx.x % tiles) * kVqSide, rows = call.from.count(head);
  if (first >= rows || (call.from.rows && rows <= call.few)) return;
  const int stages = (call.codebook.depth + Product::depth - 1) / Product::depth;
  const SearchMemory<Product, SLABS> memory{dynamic_shared<SearchMemory<Product, SLABS>::bytes>()};
  SearchBlock<T, Product, SLABS>{call, memory, head, stages}.run(first, rows);
}

}  // namespace fastsr::cuda
