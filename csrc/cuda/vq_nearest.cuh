// Nearest-code search: the kernels of vq_data.cuh, vq_search.cuh and vq_exact.cuh in a row, with nothing decided on the host.
//
//     code_range    largest magnitude of each codebook
//     pack_codes    codes scaled by a power of two (cosine: divided by their norms), rounded to float16, in blobs
//     search_rows   all rows on tensor cores; answers what the certificate of common/vq_bound.h decides        -> list A
//                   (by mma.sync, or with FASTSR_HOPPER=1 on a Hopper GPU by wgmma: hopper/vq_search.cuh)
//     pack_codes    } in float32, where A has more than kFewRows rows, else nothing:
//     search_rows   } the rows of A by fused multiply-adds                                                     -> list B
//     scan_rows     the rows of A (few) or B with every code in float64
//
// Lists and their lengths stay on the device, later kernels have a fixed grid: no synchronisation, safe in CUDA graphs. The
// answer does not depend on the order of a list. Rows of fewer than 16 values start with float32, since tensor cores would
// multiply zeros.
//
// Moves      x three times by each row's block (once from DRAM), the packed codebook once by each block of 128 rows from L2: 2 K D
//            bytes of float16 for 256 K D operations; indices 8 bytes a row, lists 8 bytes a row, packed codebooks 6 K D bytes.
//            No N x K matrix
// Limit      D = 64: 2 D operations a score are 0.025 clocks a multiprocessor of mma.sync, 3.1 a lane of the epilogue about the same;
//            the slab, the second look at the best group (16 D bytes from L1 or L2, 8 D multiply-adds a row) and half a dozen
//            launches add to it.
//            D = 256: mma.sync's rate, about 60% of wgmma's, and 4 MiB of codes from L2 for each of 128 blocks
//
// predicted / measured, H100, float32 rows, exact indices:
//   (65536, 1024, 64)     8.6 GFLOP    0.011 ms at 798 TFLOP/s    0.045 ms / not measured yet     target 0.040
//   (16384, 8192, 256)   68.7 GFLOP    0.086 ms                   0.180 ms / not measured yet     target 0.150
#pragma once

#include "cuda/hopper/vq_search.cuh"
#include "cuda/vq_search.cuh"

namespace fastsr::cuda {

constexpr int kFewRows = 1024;     // that a scan in float64 costs less than one tile of the float32 search's latency
constexpr int kScanBlocks = 1056;  // 8 on each of 132 multiprocessors; never asked of the device

// What all kernels of a call share.
template <class T>
struct NearestCall {
  RowView<T> x;
  CodeView<T> codebook;
  int64_t rows;
  bool cosine;
  Answer answer;
};

// launch(kernel, blocks, threads, shared bytes, arguments...); allocate(bytes) is memory until the end of the call.
template <class T, class Launch, class Allocate>
class NearestSearch {
 public:
  NearestSearch(const NearestCall<T>& call, const Launch& launch, const Allocate& allocate)
      : call_(call), launch_(launch), allocate_(allocate), heads_(call.answer.heads), tiles_((call.codebook.codes + kVqSide - 1) / kVqSide),
        parts_(scratch<float>(heads_ * kRangeParts)), statistics_(scratch<CodeStatistics>(2 * heads_)), counters_(scratch<unsigned>(2 * heads_)) {}

  void run(bool tensor_cores) {
    launch_(code_range<T>, heads_ * kRangeParts, kVqThreads, 0, call_.codebook, parts_, statistics_, counters_, 2 * static_cast<int>(heads_));
    const RowList all{nullptr, nullptr, call_.rows};
    RowList first = list(), second = first;
    if (tensor_cores) {
      search<TensorProduct>(all, first, 0);
      second = list();
      search<FmaProduct>(first, second, kFewRows);
    } else {
      search<FmaProduct>(all, first, 0);
    }
    launch_(scan_rows<T>, kScanBlocks, kVqThreads, 0, call_.x, call_.codebook, call_.cosine, first, second, kFewRows, call_.answer);
  }

 private:
  template <class Value>
  Value* scratch(int64_t count) const {
    return static_cast<Value*>(allocate_(count * static_cast<int64_t>(sizeof(Value))));
  }

  RowList list() { return {scratch<int>(heads_ * call_.rows), counters_ + heads_ * lists_++, call_.rows}; }

  template <class Product>
  void search(const RowList& from, const RowList& to, int few) {
    const int depth = call_.codebook.depth, stages = (depth + Product::depth - 1) / Product::depth;
    CodeStatistics* statistics = statistics_ + heads_ * searches_++;
    auto* packed = scratch<unsigned char>(heads_ * tiles_ * stages * Product::blob_bytes);
    launch_(pack_codes<Product, T>, heads_ * tiles_, kVqThreads, 0, call_.codebook, parts_, packed, stages, statistics, call_.cosine, from, few);
    const Search<T> arguments{call_.x, call_.codebook, packed, statistics, from, to, few, call_.cosine, call_.answer};
    const int slabs = (depth + Product::slab_depth - 1) / Product::slab_depth;
    if constexpr (std::is_same_v<Product, TensorProduct>) {
      if (slabs <= Product::most_slabs && launch_.hopper()) {
        return slabs == 1 ? search_on_hopper<1>(arguments) : search_on_hopper<Product::most_slabs>(arguments);
      }
    }
    if (slabs == 1) {
      search<Product, 1>(arguments);
    } else if (slabs <= Product::most_slabs) {
      search<Product, Product::most_slabs>(arguments);
    } else {
      search<Product, 0>(arguments);
    }
  }

  template <class Product, int SLABS>
  void search(const Search<T>& arguments) const {
    launch_(search_rows<Product, SLABS, T>, row_blocks(), kVqThreads, SearchMemory<Product, SLABS>::bytes, arguments);
  }

  // Reads the same packed codebook.
  template <int SLABS>
  void search_on_hopper(const Search<T>& arguments) const {
    launch_(hopper::search_rows_hopper<SLABS, T>, row_blocks(), hopper::kSearchThreads, hopper::SearchRing<SLABS>::bytes, arguments);
  }

  int64_t row_blocks() const { return heads_ * ((call_.rows + kVqSide - 1) / kVqSide); }

  const NearestCall<T>& call_;
  const Launch& launch_;
  const Allocate& allocate_;
  int64_t heads_, tiles_;
  float* parts_;
  CodeStatistics* statistics_;
  unsigned* counters_;
  int lists_ = 0, searches_ = 0;
};

constexpr int kTensorDepth = 16;  // one step of m16n8k16

template <class T, class Launch, class Allocate>
void find_nearest(const NearestCall<T>& call, const Launch& launch, const Allocate& allocate, bool tensor_cores) {
  NearestSearch<T, Launch, Allocate>(call, launch, allocate).run(tensor_cores);
}

}  // namespace fastsr::cuda
