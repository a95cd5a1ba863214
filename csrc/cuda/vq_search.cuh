// The certified nearest-code search over rows and a packed codebook: one pass over all codes, then the candidates in float64.
//
//   grid.x = heads * tiles of 128 rows
//
//                  codes, in tiles of 128 (their blobs stream through two stages)
//                 +--------+--------+--------+----            1. read the rows: largest magnitude, norms, rounding error
//            128  | scores | scores |        | ...            2. put them into the slab, scaled and rounded
//           rows  |        |        |        |                3. for each tile: products, s' = |e|^2/2 - x.e, best groups of 8
//     (the slabs) +--------+--------+--------+----            4. of each row: s'_1 and B; groups within 2 B are compared in float64 by 8
//                  kept: the best groups of each owner           lanes, one code each, if there are several; a single one is first
//                                                                multiplied again in float32, which names its code nearly always; a row
//                                                                of which a group within 2 B was not kept, or that is not finite, goes
//                                                                to the list
//
// Lives in   registers: 64 sums and the kept groups    shared: SLABS x 64 values of 128 rows, two blobs (vq_data.cuh), scales
//            L2: the packed codebook, read once by each block
// SLABS = 0 serves longer rows: one slab, filled anew for each tile and 64 values, from L2.
#pragma once

#include "cuda/vq_rows.cuh"

namespace fastsr::cuda {

template <class T, class Product, int SLABS>
struct SearchBlock : SearchRows<T, Product, SLABS> {
  using Rows = SearchRows<T, Product, SLABS>;
  using Rows::call, Rows::memory, Rows::head;
  static constexpr int kStages = Product::stages(SLABS);

  __device__ __forceinline__ void stage(const unsigned char* packed, int i) const {
    const unsigned char* from = packed + static_cast<int64_t>(i) * Product::blob_bytes;
    for (int at = threadIdx.x * 16; at < Product::blob_bytes; at += kVqThreads * 16) copy_async_16(memory.blob(i) + at, from + at, 16);
  }

  // Step 3.
  __device__ __forceinline__ void search(Kept<Product::keep> (&kept)[Product::rows], const unsigned char* packed, int count) const {
    const int depth = call.codebook.depth;
    Product product;
    int tile = 0, begin = 0;  // the first value of the stage
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      wait_copies<kStages - 2>();
      // The blob is there for every thread, and the one before it, and its slab, are read no more.
      Rows::sync();
      if (i + kStages - 1 < count) stage(packed, i + kStages - 1);
      commit_copies();
      if (SLABS == 0 && begin % Product::slab_depth == 0) {
        Rows::fill(0, begin);
        Rows::sync();
      }
      if (begin == 0) product.clear();
      product.multiply(memory.slab(SLABS ? begin / Product::slab_depth : 0), begin % Product::slab_depth, memory.blob(i), depth - begin);
      begin += Product::depth;
      if (begin >= depth) {
        product.fold(kept, memory.ratios(), reinterpret_cast<const float*>(memory.blob(i) + Product::blob_bytes) - kVqSide, tile);
        ++tile, begin = 0;
      }
    }
    Rows::sync();
  }

  // Stages: of the depth.
  __device__ __forceinline__ void run(int64_t first, int64_t rows, int stages) const {
    const int tiles = (call.codebook.codes + kVqSide - 1) / kVqSide, count = tiles * stages;
    const unsigned char* packed = call.packed + static_cast<int64_t>(head) * count * Product::blob_bytes;
    // The first blobs are under way meanwhile; rows are measured where their slab will lie.
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count) stage(packed, i);
      commit_copies();
    }
    Rows::list(first, rows);
    Rows::prepare();
    Kept<Product::keep> kept[Product::rows];
#pragma unroll
    for (auto& row : kept) row.clear();
    search(kept, packed, count);
    Rows::finish(kept);
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
  SearchBlock<T, Product, SLABS>{{call, memory, head}}.run(first, rows, stages);
}

}  // namespace fastsr::cuda
