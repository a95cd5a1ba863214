// The certified nearest-code search on Hopper: as vq_search.cuh, with the products by wgmma and the codes by bulk copies.
#pragma once

#include "cuda/hopper/enabled.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/hopper/wgmma.cuh"
#include "cuda/vq_rows.cuh"

namespace fastsr::cuda::hopper {

constexpr int kSearchThreads = kVqThreads + 32;

// A warpgroup multiplies 64 rows with the tile's 128 codes; a lane holds 32 scores of each of two rows, four groups of eight.
struct WgmmaProduct : TensorProduct {
  static constexpr int owners = 4, rows = 2, groups = 4;
  static constexpr int blocks(int slabs) { return slabs == 1 ? 2 : 1; }
  static constexpr int stages(int slabs) { return slabs == 1 ? 5 : 8; }
  static constexpr int blob_pitch = (blob_bytes + 1023) / 1024 * 1024;
  static_assert(place(5, 3) == static_cast<int>(tile_place(Swizzle::span128, 5, 3 * 16)) && slab_bytes % 1024 == 0);
  float sums[kVqSide / 2];

  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 32 * 16 + i * 8 + threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int owner() { return threadIdx.x % 4; }
  static __device__ __forceinline__ int code(int owner, int group, int i) {
    return group / groups * kVqSide + (group % groups * 4 + i / 2) * 8 + owner * 2 + i % 2;
  }

  // Puts a stage's products under way, of 64 values whether they exist or are zero: branches among them would make ptxas
  // order the registers anew. The first stage of a tile does not add.
  __device__ __forceinline__ void multiply(uint32_t slab, uint32_t blob, bool first) {
    const uint32_t mine = slab + threadIdx.x / 128 * 64 * 128;
    fence();
#pragma unroll
    for (int k = 0; k < depth / 16; ++k) {
      hopper::multiply<__half, kVqSide>(sums, tile_descriptor(Swizzle::span128, mine, k * 32), tile_descriptor(Swizzle::span128, blob, k * 32), k > 0 || !first);
    }
    commit();
  }

  __device__ __forceinline__ void fold(Kept<keep> (&kept)[rows], const float (&ratios)[rows], const float* halves, int tile) const {
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      Pack<float, 2> half[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) half[n] = *reinterpret_cast<const Pack<float, 2>*>(halves + (group * 4 + n) * 8 + threadIdx.x % 4 * 2);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        offer_pairs(kept[r], half, ratios[r], tile * groups + group, [&](int i) { return sums[(group * 4 + i / 2) * 4 + r * 2 + i % 2]; });
      }
    }
  }
};

// Shared memory as in vq_rows.cuh, then the ring's barriers.
template <int SLABS>
struct SearchRing {
  using Memory = SearchMemory<WgmmaProduct, SLABS>;
  static constexpr int stages = WgmmaProduct::stages(SLABS);
  static constexpr int bytes = Memory::bytes + 2 * stages * static_cast<int>(sizeof(Barrier));
  static_assert(Memory::bytes % alignof(Barrier) == 0);

  Memory memory;
  __device__ __forceinline__ Barrier& full(int i) const { return reinterpret_cast<Barrier*>(memory.start + Memory::bytes)[i % stages]; }
  __device__ __forceinline__ Barrier& empty(int i) const { return (&full(0))[stages + i % stages]; }
  static __device__ __forceinline__ uint32_t parity(int i) { return i / stages % 2; }

  static __device__ __forceinline__ SearchRing make() {
    const SearchRing ring{{dynamic_shared_1024<bytes>()}};
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < stages; ++i) ring.full(i).init(1), ring.empty(i).init(kVqThreads / 32);
      fence_barriers();
    }
    __syncthreads();
    return ring;
  }

  // The producer's part: a thread of its own.
  __device__ __forceinline__ void fill(const unsigned char* packed, int count) const {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      empty(i).wait(parity(i) ^ 1);
      full(i).arrive_expecting(WgmmaProduct::blob_bytes);
      copy_bulk(memory.blob(i), packed + static_cast<int64_t>(i) * WgmmaProduct::blob_bytes, WgmmaProduct::blob_bytes, full(i));
    }
  }

  // A warp has read stage i.
  __device__ __forceinline__ void release(int i) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty(i).arrive();
  }
};

// Step 3 of vq_search.cuh, by one of the two warpgroups.
template <int SLABS>
__device__ __forceinline__ void search(const SearchRing<SLABS>& ring, Kept<WgmmaProduct::keep> (&kept)[WgmmaProduct::rows], int tiles, int depth) {
  WgmmaProduct product;
  float ratios[WgmmaProduct::rows];
#pragma unroll
  for (int r = 0; r < WgmmaProduct::rows; ++r) ratios[r] = ring.memory.ratios()[product.row(r)];
  int i = 0;  // the stage
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll 1
    for (int begin = 0; begin < depth; begin += WgmmaProduct::depth, ++i) {
      ring.full(i).wait(ring.parity(i));
      product.multiply(shared_address(ring.memory.slab(begin / WgmmaProduct::depth)), shared_address(ring.memory.blob(i)), begin == 0);
      if (begin > 0) {
        wait<1>();
        ring.release(i - 1);
      }
    }
    wait<0>(product.sums);
    product.fold(kept, ratios, reinterpret_cast<const float*>(ring.memory.blob(i - 1) + WgmmaProduct::blob_bytes) - kVqSide, tile);
    ring.release(i - 1);
  }
}

// A block per head and 128 rows, as search_rows.
template <int SLABS, class T>
__global__ void __launch_bounds__(kSearchThreads, WgmmaProduct::blocks(SLABS)) search_rows_hopper(const __grid_constant__ Search<T> call) {
#if FASTSR_SM90A
  const unsigned row_tiles = gridDim.x / call.answer.heads;
  const int head = blockIdx.x / row_tiles, depth = call.codebook.depth;
  const int64_t first = static_cast<int64_t>(blockIdx.x % row_tiles) * kVqSide, rows = call.from.count(head);
  if (first >= rows) return;
  const int tiles = (call.codebook.codes + kVqSide - 1) / kVqSide, stages = (depth + WgmmaProduct::depth - 1) / WgmmaProduct::depth;
  const auto ring = SearchRing<SLABS>::make();
  if (threadIdx.x >= kVqThreads) {
    if (threadIdx.x == kVqThreads) ring.fill(call.packed + static_cast<int64_t>(head) * tiles * stages * WgmmaProduct::blob_bytes, tiles * stages);
    return;
  }
  const SearchRows<T, WgmmaProduct, SLABS> block{call, ring.memory, head};
  block.list(first, rows);
  block.prepare();
  fence_async_proxy();
  block.sync();
  Kept<WgmmaProduct::keep> kept[WgmmaProduct::rows];
#pragma unroll
  for (auto& row : kept) row.clear();
  search(ring, kept, tiles, depth);
  block.sync();
  block.finish(kept);
#else
  not_for_this_gpu();
#endif
}

}  // namespace fastsr::cuda::hopper
