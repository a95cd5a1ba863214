// The inner products of the nearest-code search over a tile of 128 rows x 128 codes, and the best groups of codes that they keep.
//
// A thread owns some codes of some rows. Eight codes of a row in one thread are a group; of all groups that it meets for a row, a
// thread (an "owner" of the row) keeps the KEEP best with their numbers, and the value of the next one. Beyond the product of the
// depth, a score costs one fused multiply-add, 7/8 of a minimum and, for KEEP = 2, ten operations / 8.
//
//     FmaProduct      16 x 16 threads, each 8 rows x 8 codes; 16 owners of a row; values as float32
//
//                        codes  0..3  4..7 ... 60..63 | 64..67 ...       thread (ty, tx): rows 4 ty.., 64 + 4 ty..
//                       rows    tx0   tx1      tx15      tx0                              codes 4 tx.., 64 + 4 tx..
//
//     TensorProduct   8 warps, 4 x 2, each 32 rows x 64 codes by m16n8k16; 8 owners of a row (4 lanes x 2 warps); values as
//                     float16. Of a warp's eight tiles of 8 codes, tiles 0..3 and 4..7 hold a group each of every lane.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/vq_data.cuh"

namespace fastsr::cuda {

// The best groups that a thread has met for one row.
template <int KEEP>
struct Kept {
  float value[KEEP + 1];  // ascending; the last one's group is not kept
  int group[KEEP];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i <= KEEP; ++i) value[i] = INFINITY;
#pragma unroll
    for (int i = 0; i < KEEP; ++i) group[i] = 0;
  }
  // Without branches: from the last to the first, each place takes the newcomer, its upper neighbour's content, or stays.
  __device__ __forceinline__ void insert(float v, int number) {
#pragma unroll
    for (int i = KEEP; i > 0; --i) {
      if (i < KEEP) {
        const int stays = v < value[i] ? number : group[i];
        group[i] = v < value[i - 1] ? group[i - 1] : stays;
      }
      value[i] = fminf(value[i], fmaxf(value[i - 1], v));
    }
    group[0] = v < value[0] ? number : group[0];
    value[0] = fminf(value[0], v);
  }
};

// IEEE float32 fused multiply-adds.
struct FmaProduct {
  static constexpr int depth = 16, slab_depth = 64;  // of a stage of codes; of a slab of rows
  static constexpr int owners = 16, keep = 1, rows = 8;
  static constexpr int most_slabs = 1;  // that stay in shared memory
  static constexpr bool refines = false;  // multiplies the best group once more
  static constexpr int blocks(int slabs) { return slabs ? 2 : 1; }  // of a multiprocessor, for which registers are left
  static constexpr int stages(int /* slabs */) { return 2; }        // of codes in shared memory
  static constexpr int pitch = kVqSide + 4;
  static constexpr int slab_bytes = slab_depth * pitch * 4;
  static constexpr int blob_bytes = depth * kVqSide * 4 + kVqSide * 4, blob_pitch = blob_bytes;  // pitch: in shared memory
  float sums[8][8];

  static __device__ __forceinline__ double accumulation(int64_t d) { return vq::fma_error(d); }
  static __device__ __forceinline__ float rounded(float v) { return v; }
  static __device__ __forceinline__ void put_codes(unsigned char* blob, int code, int d, const float (&v)[kVqUnit]) {
#pragma unroll
    for (int i = 0; i < kVqUnit; ++i) reinterpret_cast<float*>(blob)[(d + i) * kVqSide + code] = v[i];
  }
  static __device__ __forceinline__ void put_row(unsigned char* slab, int row, int d, const float (&v)[kVqUnit]) {
#pragma unroll
    for (int i = 0; i < kVqUnit; ++i) reinterpret_cast<float*>(slab)[(d + i) * pitch + row] = v[i];
  }
  static __device__ __forceinline__ int row(int i) { return i / 4 * 64 + threadIdx.x / 16 * 4 + i % 4; }
  static __device__ __forceinline__ int owner() { return threadIdx.x % 16; }
  // Code i of a group that an owner kept.
  static __device__ __forceinline__ int code(int owner, int group, int i) { return group * kVqSide + i / 4 * 64 + owner * 4 + i % 4; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sums[r][c] = 0;
    }
  }

  // Adds the products of a stage; it begins at value `begin` of the slab and holds `count` values that exist.
  __device__ __forceinline__ void multiply(const unsigned char* slab, int begin, const unsigned char* blob, int count) {
    const float* x = reinterpret_cast<const float*>(slab) + begin * pitch + threadIdx.x / 16 * 4;
    const float* e = reinterpret_cast<const float*>(blob) + threadIdx.x % 16 * 4;
#pragma unroll 1
    for (int d = 0; d < min(depth, count); ++d) {
      const Pack<float> low = *reinterpret_cast<const Pack<float>*>(x + d * pitch), high = *reinterpret_cast<const Pack<float>*>(x + d * pitch + 64);
      const Pack<float> left = *reinterpret_cast<const Pack<float>*>(e + d * kVqSide);
      const Pack<float> right = *reinterpret_cast<const Pack<float>*>(e + d * kVqSide + 64);
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const float v = r < 4 ? low.v[r % 4] : high.v[r % 4];
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[r][c] = fmaf(v, c < 4 ? left.v[c % 4] : right.v[c % 4], sums[r][c]);
      }
    }
  }

  // The sums are complete: s' = ratio |e|^2 / 2 - sum, and each row's group is offered.
  __device__ __forceinline__ void fold(Kept<keep> (&kept)[rows], const float* ratios, const float* halves, int tile) {
    Pack<float> half[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) half[i] = *reinterpret_cast<const Pack<float>*>(halves + i * 64 + threadIdx.x % 16 * 4);
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const float ratio = ratios[row(r)];
      float least = fmaf(half[0].v[0], ratio, -sums[r][0]);
#pragma unroll
      for (int c = 1; c < 8; ++c) least = fminf(least, fmaf(half[c / 4].v[c % 4], ratio, -sums[r][c]));
      kept[r].insert(least, tile);
    }
  }
};

// Offers a row's group, four pairs of codes whose products are sum(0 .. 7): the least of s' = ratio |e|^2 / 2 - sum.
template <int KEEP, class Sum>
__device__ __forceinline__ void offer_pairs(Kept<KEEP>& kept, const Pack<float, 2> (&half)[4], float ratio, int number, Sum sum) {
  float least = fmaf(half[0].v[0], ratio, -sum(0));
#pragma unroll
  for (int i = 1; i < kVqUnit; ++i) least = fminf(least, fmaf(half[i / 2].v[i % 2], ratio, -sum(i)));
  kept.insert(least, number);
}

// float16 tensor cores with float32 sums. Rows and codes of 64 values take 128 bytes, their 16-byte units swapped by the row's
// number modulo 8, so that the 8 rows of an ldmatrix fill the 32 banks once.
struct TensorProduct {
  static constexpr int depth = 64, slab_depth = 64;
  static constexpr int owners = 8, keep = 2, rows = 4;
  static constexpr int most_slabs = 4;
  static constexpr bool refines = true;
  static constexpr int blocks(int slabs) { return slabs ? 2 : 1; }
  static constexpr int stages(int /* slabs */) { return 2; }
  static constexpr int slab_bytes = kVqSide * slab_depth * 2;
  static constexpr int blob_bytes = kVqSide * depth * 2 + kVqSide * 4, blob_pitch = blob_bytes;
  float sums[2][8][4];  // [16 rows][8 codes]

  static __device__ __forceinline__ double accumulation(int64_t d) { return vq::tensor_core_error(d); }
  static __device__ __forceinline__ float rounded(float v) { return to_float(from_float<__half>(v)); }
  static constexpr __device__ __forceinline__ int place(int row, int unit) { return row * 128 + (unit ^ row % 8) * 16; }
  static __device__ __forceinline__ void put_row(unsigned char* slab, int row, int d, const float (&v)[kVqUnit]) {
    Pack<__half> pack;
#pragma unroll
    for (int i = 0; i < kVqUnit; ++i) pack.v[i] = from_float<__half>(v[i]);
    *reinterpret_cast<Pack<__half>*>(slab + place(row, d / kVqUnit)) = pack;
  }
  static __device__ __forceinline__ void put_codes(unsigned char* blob, int code, int d, const float (&v)[kVqUnit]) { put_row(blob, code, d, v); }
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 64 * 32 + i / 2 * 16 + i % 2 * 8 + threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int owner() { return threadIdx.x / 32 % 2 * 4 + threadIdx.x % 4; }
  static __device__ __forceinline__ int code(int owner, int group, int i) {
    return group / 2 * kVqSide + owner / 4 * 64 + (group % 2 * 4 + i / 2) * 8 + owner % 4 * 2 + i % 2;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
      }
    }
  }

  __device__ __forceinline__ void multiply(const unsigned char* slab, int /* begin: a stage is a slab deep */, const unsigned char* blob,
                                           int count) {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 64 * 32, first_code = threadIdx.x / 32 % 2 * 64;
#pragma unroll
    for (int k = 0; k < depth / 16; ++k) {
      if (k * 16 >= count) break;
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices(a[m], slab + place(first_row + m * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t b[4];
        load_matrices(b, blob + place(first_code + n * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma<__half>(sums[m][n], a[m], b[0], b[1]);
          mma<__half>(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void fold(Kept<keep> (&kept)[rows], const float* ratios, const float* halves, int tile) {
    const float* mine = halves + threadIdx.x / 32 % 2 * 64 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      Pack<float, 2> half[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) half[n] = *reinterpret_cast<const Pack<float, 2>*>(mine + (group * 4 + n) * 8);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        offer_pairs(kept[r], half, ratios[row(r)], tile * 2 + group, [&](int i) { return sums[r / 2][group * 4 + i / 2][r % 2 * 2 + i % 2]; });
      }
    }
  }
};

}  // namespace fastsr::cuda
