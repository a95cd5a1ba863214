// Sums over the rows of each code, with bits that repeat: a stable counting sort of the rows by code, then one pass over them.
//
//   count_rows       chunk of rows -> how many of each code it holds        table [chunks][codes]; integers, so atomics change nothing
//   sum_chunks       table -> rows of the code in earlier chunks; totals
//   scan_counts      totals -> where the rows of each code begin
//   place_rows       a warp per chunk, in order, 32 rows at a time          sorted [rows]: (row, code), rows of a code ascending
//
//   sum_segments     a warp per tile of the sorted rows and 32 channels
//
//       sorted   | code 3 code 3 code 5 code 5 | code 5 code 5 code 5 code 5 | code 5 code 9 ...
//       a tile   |  sums[3]       tail         |  head                       |  head   sums[9]
//
//   join_segments    tail + head + head ... of a code that several tiles share, in eight parts, in order
//
// However the rows are spread over the codes, each warp adds equally many; a segment that is one code's alone costs the same. The
// codes of all heads are numbered through (head * K + code) and so are the rows (the elements of `indices`): one sort serves all.
//
// Sums by atomics need no sort: vq_atomic_sums.cuh. Their bits change from run to run, and they queue up where few codes take most rows,
// as in a fresh codebook.
//
// Moves      x once, and indices and mask twice; 8 bytes a row of sorted rows, written and read; the table four times, which has at
//            most 8 bytes a row or 128 a code; 16 D bytes for each tile of 64 rows or more
// Lives in   registers: a sum per lane in float64, 8 rows' values in flight     L1: the chunk's line of the table
// Limit      latency of the short kernels; DRAM bandwidth for x. Where pixels lie side by side (channels first), each value read
//            brings 32 bytes from L2: 8 times the bytes, 16 times in 16 bits
//
// predicted / measured, H100 at 3.35 TB/s, (65536, 1024, 64), x in L2: sort 0.010 ms, sums 0.006 ms, channels first 0.030 ms /
// not measured yet
#pragma once

#include <algorithm>

#include "cuda/vq_data.cuh"

namespace fastsr::cuda {

constexpr int kTableCodes = 32;  // of a block of sum_chunks, whose eight warps share the chunks
constexpr int kScanThreads = 1024, kScanValues = 4;
constexpr int kSegmentChannels = 32;
constexpr int kSumsAtOnce = 8;   // rows whose values are under way together

// Rows numbered as the elements of the contiguous `indices` (outer, heads, inner), and the codes of all heads numbered through.
struct NumberedRows {
  const int64_t* indices;
  const bool* mask;  // or null: every row counts
  int count;         // of all heads
  int heads, inner, codes;

  __device__ __forceinline__ int head(int row) const { return row / inner % heads; }
  // The code's number; -1 where the row does not count. An index that is no code's counts nowhere.
  __device__ __forceinline__ int key(int row) const {
    const int64_t index = indices[row];
    return (mask && !mask[row]) || index < 0 || index >= codes ? -1 : head(row) * codes + static_cast<int>(index);
  }
  // Where a row of x begins, in elements.
  template <class T>
  __device__ __forceinline__ int64_t offset(const RowView<T>& x, int row) const {
    return row / inner / heads * x.outer_stride + head(row) * x.head_stride + row % inner * x.inner_stride;
  }
};

struct SortedRow {
  int row, code;
};

// What the sort leaves: rows[offsets[k]] to rows[offsets[k + 1] - 1] are the rows of code k.
struct SortedRows {
  const SortedRow* rows;
  const int* offsets;  // [codes + 1]
  int codes;           // of all heads

  // M D of the losses, at least 1.
  __device__ __forceinline__ double values(int depth) const { return fmax(1.0, static_cast<double>(offsets[codes]) * depth); }
};

// table[chunk][code] = rows of the chunk that have the code; a block per chunk.
static __global__ void __launch_bounds__(kVqThreads) count_rows(NumberedRows rows, int chunk, int* table) {
  const int codes = rows.heads * rows.codes;
  int* mine = table + static_cast<int64_t>(blockIdx.x) * codes;
  for (int i = threadIdx.x; i < codes; i += kVqThreads) mine[i] = 0;
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * chunk, end = min(begin + chunk, static_cast<int64_t>(rows.count));
#pragma unroll 4
  for (int64_t row = begin + threadIdx.x; row < end; row += kVqThreads) {
    const int key = rows.key(static_cast<int>(row));
    if (key >= 0) atomicAdd(mine + key, 1);
  }
}

// Each code's column of the table becomes its sums over the earlier chunks; counts[code] = the total.
static __global__ void __launch_bounds__(kVqThreads) sum_chunks(int* table, int chunks, int codes, int64_t* counts) {
  __shared__ int sums[kVqThreads / kTableCodes][kTableCodes];
  constexpr int kParts = kVqThreads / kTableCodes;
  const int local = threadIdx.x % kTableCodes, part = threadIdx.x / kTableCodes, code = blockIdx.x * kTableCodes + local;
  const int begin = chunks * part / kParts, end = code < codes ? chunks * (part + 1) / kParts : begin;
  int* column = table + code;
  int sum = 0;
#pragma unroll 8
  for (int i = begin; i < end; ++i) sum += column[static_cast<int64_t>(i) * codes];
  sums[part][local] = sum;
  __syncthreads();
  int before = 0;
  for (int i = 0; i < part; ++i) before += sums[i][local];
#pragma unroll 8
  for (int i = begin; i < end; ++i) {
    int* const at = column + static_cast<int64_t>(i) * codes;
    const int here = *at;
    *at = before, before += here;
  }
  if (part == kParts - 1 && code < codes) counts[code] = before;
}

// offsets[code] = sum of the counts of all codes before; one block.
static __global__ void __launch_bounds__(kScanThreads) scan_counts(const int64_t* counts, int codes, int* offsets) {
  __shared__ int totals[kScanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;
  for (int first = 0; first < codes; first += kScanThreads * kScanValues) {
    const int begin = first + threadIdx.x * kScanValues;
    int value[kScanValues], sum = 0;
#pragma unroll
    for (int i = 0; i < kScanValues; ++i) {
      value[i] = begin + i < codes ? static_cast<int>(counts[begin + i]) : 0;
      sum += value[i];
    }
    int upto = sum;  // inclusive, within the warp
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, upto, step);
      if (lane >= step) upto += other;
    }
    if (lane == 31) totals[warp] = upto;
    __syncthreads();
    int at = before + upto - sum;
    for (int i = 0; i < kScanThreads / 32; ++i) {
      if (i < warp) at += totals[i];
      before += totals[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kScanValues; ++i) {
      if (begin + i < codes) offsets[begin + i] = at;
      at += value[i];
    }
  }
  if (threadIdx.x == 0) offsets[codes] = before;
}

// Puts each row at its place; a warp per chunk. Lanes with the same code take places in the order of their rows.
static __global__ void __launch_bounds__(32) place_rows(NumberedRows rows, int chunk, int* table, const int* offsets, SortedRow* sorted) {
  const int lane = threadIdx.x;
  int* mine = table + static_cast<int64_t>(blockIdx.x) * rows.heads * rows.codes;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * chunk, end = min(begin + chunk, static_cast<int64_t>(rows.count));
  const auto key_of = [&](int64_t row) { return row < end ? rows.key(static_cast<int>(row)) : -1; };
  int next = key_of(begin + lane);
  for (int64_t first = begin; first < end; first += 32) {
    const int key = next;
    next = key_of(first + 32 + lane);
    const unsigned same = __match_any_sync(0xffffffffu, key);
    const int leader = __ffs(static_cast<int>(same)) - 1, rank = __popc(same & ((1u << lane) - 1));
    int at = 0;
    if (key >= 0 && lane == leader) {
      at = mine[key];
      mine[key] = at + __popc(same);
    }
    at = __shfl_sync(0xffffffffu, at, leader) + rank;
    if (key >= 0) sorted[offsets[key] + at] = {static_cast<int>(first) + lane, key};
    __syncwarp();  // the next leader of a code may be another lane
  }
}

// sums[code] = factor * the sum of x, or of minuend - x where there is one, over the code's rows.
template <class T, class Sum>
struct Segments {
  RowView<T> x, minuend;  // minuend.data null: none
  NumberedRows numbers;
  SortedRows sorted;
  int depth;
  int length;          // of a tile
  double* shared;      // [tiles][head, tail][depth]: sums of codes that several tiles share
  const float* grad;   // factor = 2 grad / (M D); null: 1
  Sum* sums;           // [codes][depth], zero where a code has no row

  __device__ __forceinline__ double* part(int tile, int tail, int channel) const {
    return shared + (static_cast<int64_t>(tile) * 2 + tail) * depth + channel;
  }
  __device__ __forceinline__ void write(int code, int channel, double sum) const {
    const double factor = grad ? 2.0 * *grad / sorted.values(depth) : 1.0;
    sums[static_cast<int64_t>(code) * depth + channel] = from_float<Sum>(static_cast<float>(factor * sum));
  }
};

template <class T, class Sum>
__global__ void __launch_bounds__(kVqThreads, 3) sum_segments(const __grid_constant__ Segments<T, Sum> call) {
  const int slabs = (call.depth + kSegmentChannels - 1) / kSegmentChannels;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kVqThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, channel = static_cast<int>(warp % slabs) * kSegmentChannels + lane, tile = static_cast<int>(warp / slabs);
  const SortedRow* rows = call.sorted.rows;
  const int64_t count = call.sorted.offsets[call.sorted.codes], begin = static_cast<int64_t>(tile) * call.length;
  const int64_t end = min(begin + call.length, count);
  if (begin >= end) return;
  const bool exists = channel < call.depth;
  int code = rows[begin].code;
  bool shared = begin > 0 && rows[begin - 1].code == code;  // with the tile before
  double sum = 0;
  for (int64_t first = begin; first < end; first += 32) {
    const SortedRow mine = first + lane < end ? rows[first + lane] : SortedRow{0, -1};
    const int64_t from = call.numbers.offset(call.x, mine.row);
    const int64_t less = call.minuend.data ? call.numbers.offset(call.minuend, mine.row) : 0;
#pragma unroll 1
    for (int i = 0; i < 32; i += kSumsAtOnce) {
      float value[kSumsAtOnce];
#pragma unroll
      for (int j = 0; j < kSumsAtOnce; ++j) {
        const int64_t x = __shfl_sync(0xffffffffu, from, i + j), q = __shfl_sync(0xffffffffu, less, i + j);
        const bool there = exists && first + i + j < end;
        value[j] = there ? to_float(call.x.data[x + channel * call.x.depth_stride]) : 0.0f;
        if (call.minuend.data) value[j] = there ? to_float(call.minuend.data[q + channel * call.minuend.depth_stride]) - value[j] : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kSumsAtOnce; ++j) {
        const int next = __shfl_sync(0xffffffffu, mine.code, i + j);
        if (next >= 0 && next != code) {
          if (exists) {
            if (shared) *call.part(tile, 0, channel) = sum;
            else call.write(code, channel, sum);
          }
          code = next, sum = 0, shared = false;
        }
        sum += value[j];
      }
    }
  }
  if (!exists) return;
  if (shared) *call.part(tile, 0, channel) = sum;
  else if (end < count && rows[end].code == code) *call.part(tile, 1, channel) = sum;
  else call.write(code, channel, sum);
}

// A block per tile and 32 channels: if the tile's last code goes on in later tiles and began here, its parts are added.
template <class T, class Sum>
__global__ void __launch_bounds__(kVqThreads) join_segments(const __grid_constant__ Segments<T, Sum> call) {
  constexpr int kParts = kVqThreads / kSegmentChannels;
  __shared__ double sums[kParts][kSegmentChannels];
  const int slabs = (call.depth + kSegmentChannels - 1) / kSegmentChannels;
  const int tile = blockIdx.x / slabs, lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int channel = blockIdx.x % slabs * kSegmentChannels + lane;
  const int64_t begin = static_cast<int64_t>(tile) * call.length, end = begin + call.length;
  if (end >= call.sorted.offsets[call.sorted.codes]) return;
  const int code = call.sorted.rows[end - 1].code;
  if (call.sorted.rows[end].code != code || call.sorted.offsets[code] < begin) return;
  const int later = static_cast<int>((call.sorted.offsets[code + 1] - 1) / call.length) - tile;
  const bool exists = channel < call.depth;
  double sum = part == 0 && exists ? *call.part(tile, 1, channel) : 0.0;
  const int64_t last = exists ? static_cast<int64_t>(later) * (part + 1) / kParts : 0;
#pragma unroll 8
  for (int64_t i = static_cast<int64_t>(later) * part / kParts; i < last; ++i) sum += *call.part(tile + 1 + static_cast<int>(i), 0, channel);
  sums[part][lane] = sum;
  __syncthreads();
  if (part > 0 || !exists) return;
  for (int i = 1; i < kParts; ++i) sum += sums[i][lane];
  call.write(code, channel, sum);
}

// The kernels above in a row. launch and allocate as NearestSearch takes them.
template <class Launch, class Allocate>
SortedRows sort_rows(const NumberedRows& rows, int64_t* counts, const Launch& launch, const Allocate& allocate) {
  const int codes = rows.heads * rows.codes;
  // More chunks are shorter for place_rows and a larger table for the others.
  int64_t chunks = std::min(std::max(int64_t{2} * rows.count / codes, int64_t{32}), int64_t{256});
  const int chunk = static_cast<int>((rows.count + chunks * 32 - 1) / (chunks * 32) * 32);
  chunks = (rows.count + int64_t{chunk} - 1) / chunk;
  auto* table = static_cast<int*>(allocate(chunks * codes * static_cast<int64_t>(sizeof(int))));
  auto* offsets = static_cast<int*>(allocate((codes + int64_t{1}) * static_cast<int64_t>(sizeof(int))));
  auto* sorted = static_cast<SortedRow*>(allocate(rows.count * static_cast<int64_t>(sizeof(SortedRow))));
  launch(count_rows, chunks, kVqThreads, 0, rows, chunk, table);
  launch(sum_chunks, (codes + int64_t{kTableCodes} - 1) / kTableCodes, kVqThreads, 0, table, static_cast<int>(chunks), codes, counts);
  launch(scan_counts, 1, kScanThreads, 0, counts, codes, offsets);
  launch(place_rows, chunks, 32, 0, rows, chunk, table, offsets, sorted);
  return {sorted, offsets, codes};
}

template <class T, class Sum, class Launch, class Allocate>
void sum_over_codes(Segments<T, Sum> call, const Launch& launch, const Allocate& allocate) {
  constexpr int64_t kTiles = 2048;  // about, at most
  call.length = static_cast<int>(std::max(int64_t{64}, (call.numbers.count + kTiles * 32 - 1) / (kTiles * 32) * 32));
  const int64_t tiles = (call.numbers.count + int64_t{call.length} - 1) / call.length;
  const int64_t slabs = (call.depth + int64_t{kSegmentChannels} - 1) / kSegmentChannels;
  call.shared = static_cast<double*>(allocate(tiles * 2 * call.depth * static_cast<int64_t>(sizeof(double))));
  constexpr int kWarps = kVqThreads / 32;
  launch(sum_segments<T, Sum>, (tiles * slabs + kWarps - 1) / kWarps, kVqThreads, 0, call);
  launch(join_segments<T, Sum>, tiles * slabs, kVqThreads, 0, call);
}

}  // namespace fastsr::cuda
