// The certified nearest-code search on Hopper: as vq_search.cuh, with the products by wgmma and the codes by bulk copies.
// NOT RUN ON HARDWARE YET; FASTSR_HOPPER=1 asks for it (enabled.cuh).
//
//   grid.x = heads * tiles of 128 rows; 9 warps
//
//     warp 8       one thread          packed codebook ==copy_bulk==> ring of 5 or 8 blobs: 128 codes x 64 values, |e|^2 / 2
//     warps 0..3   rows  0 ..  63      measure and round their rows (the slabs); then for each blob, as it arrives: four products
//     warps 4..7   rows 64 .. 127      m64n128k16, at the tile's last blob the best groups; after the last tile: decide
//
// The warpgroups meet before and after the search only. Within it one's products run while the other folds its scores, and with them
// (up to 64 values a row) those of a second block of the multiprocessor, whose measuring and deciding hides in the same way.
//
// Lives in   registers: 64 sums, two best groups of two rows    shared: 128 rows of up to 256 values, 16 or 64 KiB; 17 KiB a stage
//            L2: the packed codebook, read once by each block; two blocks could share it (copy_bulk_to_all), which is not done yet
//
// Roofline, 132 multiprocessors at 1.755 GHz, 4096 float16 operations a clock each; L2 taken to give 5.5 TB/s, 24 bytes a clock each:
//
//     of 64 rows x 128 codes            clocks    (65536, 1024, 64): 62 each     (16384, 8192, 256): 128 each
//     products, 64 values                  256             9 us                        75 us
//     335 instructions a warp, issue       335            12 us                        24 us, under the products
//       160 of them minima, selects        320            11 us
//     half a blob from L2, 64 values       350            12 us                       100 us
//
//     The other launches (range, packing twice, a float32 search and a scan that find nothing to do) are taken as 2 us each.
//     (65536, 1024, 64)    12 us, its ends (rows from DRAM 6 us, codes of the best groups from L1 3 us) half hidden    predicted 28 us
//     (16384, 8192, 256)   100 us, and the ends of the only wave of blocks, 12 us                                        predicted 122 us
//     measured: not measured yet; targets 40 us and 150 us
//
// In the machine code (sm_90a, nvcc 13.0, float32): the loop over stages and tiles has 335 instructions, of which 4 HGMMA.64x128x16.F32 in
// one group behind one WARPGROUP.ARRIVE, 96 FMNMX, 64 FFMA, 24 SEL, 16 FSETP, 16 LDS, 3 SYNCS; the producer's 1 UBLKCP and 2 SYNCS. No
// HGMMA waits for another, nothing is spilled (96 registers for two blocks; 114 with four slabs).
//
// Tried, by the compiler's word: leaving out products behind the last value made ptxas inject a WARPGROUP.ARRIVE at each branch; an
// aligned pointer in a register, in place of aligned memory, spilled.
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
