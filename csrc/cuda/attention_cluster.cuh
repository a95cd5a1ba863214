// Channel attention's forward in one pass: a cluster of eight blocks keeps an image in its shared memory. NOT RUN ON HARDWARE YET.
//
//     block   0         1         2              7            channels-last: an eighth of the pixels; NCHW: of the channels
//           +-------+ +-------+ +-------+     +-------+
//      x    | items | | items | | items | ... | items |       1  cp.async, all at once; the first of the residual are asked for too
//           +-------+ +-------+ +-------+     +-------+
//           | sums  | | sums  | | sums  |     | sums  |       2  of the block's own items, per channel
//           +---+---+ +---+---+ +---+---+     +---+---+
//               +---------+---------+---- ... ----+           3  cluster barrier; every block adds up all eight and computes the gate
//      out = scale * gate * items + residual                  4  from shared memory; the blocks leave together
//
// Thread layout, sums, gate and output are the text of the two-pass form; a thread reads back only what it copied itself.
//
// Taken     if FASTSR_HOPPER=1 (cuda/hopper/enabled.cuh), the image and the gate's vectors fit (in_cluster), and every picture allows units
//           of 16 bytes; channels-last with at most 32 units a pixel. `make gpu`, step "attention", runs it against the two passes and says which wins; until then nobody gets it unasked
// Lives in  shared: the items, 48 KB (3 blocks a multiprocessor) or 208 KB: images up to 1.6 MB, 112 x 112 x 64 in bf16
// Moves     x, residual, out: 3 units where two passes move 4, of which they find one in L2 as long as x fits there
// Limit     DRAM bandwidth and one launch; 16 images are 128 blocks, so 4 of 132 multiprocessors have none
//
// predicted / measured, H100 at 3.35 TB/s, with residual:
//   16x64x48x48 bf16     14 MB, 4.2 us + 3 us of latency (copy, barrier, gate, one after another)    7 us / not measured yet
//   16x64x48x48 float32  28 MB, 8.5 us + 3 us                                                       11 us / not measured yet
//   4x64x256x256         8.4 MB an image in bf16: does not fit, two passes
//   to be tried on hardware: bulk copies (cuda/hopper/tma.cuh), clusters of 16, the residual in shared memory too
#pragma once

#include "cuda/attention_gate.cuh"
#include "cuda/attention_pixels.cuh"
#include "cuda/hopper/cluster.cuh"
#include "cuda/hopper/enabled.cuh"

namespace fastsr::cuda {

// Dynamic shared memory: the items of each thread one after another, 16 bytes times the block's threads apart.
constexpr int kItemBytes = 16 * kAttentionThreads, kFewItems = 12, kMostItems = 52;

// How an image is cut for a cluster, from how two passes cut it; `steps` is 0 where it does not fit.
inline AttentionShape in_cluster(AttentionShape s, int unit, int channels, int squeezed) {
  constexpr int kBlocks = hopper::kClusterBlocks;
  const bool fits = s.unit == unit && channels <= kFewChannels && squeezed <= kFewChannels && (s.planar || s.columns == 1);
  if (s.planar) {
    s.across = kAttentionThreads / power_of_two(divided_up(channels, kBlocks), kAttentionThreads);
    s.columns = kBlocks, s.strips = 1;
  } else {
    s.strips = kBlocks;
  }
  s.steps = divided_up(s.items, static_cast<int64_t>(s.step()) * s.strips);
  if (!fits || s.steps > kMostItems) s.steps = 0;
  return s;
}

template <class T, int ITEMS>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    attend_in_cluster(AttentionShape s, GateCall<T> g, GateVectors all, Picture<const T> x, Picture<const T> residual, Picture<T> out) {
#if FASTSR_CLUSTERS
  constexpr int kUnit = 16 / sizeof(T), kStep = kInFlight<kUnit>;
  using Item = Pack<T, kUnit>;
  __shared__ float parts[kAttentionThreads], own[4][kFewChannels];
  Item* items = reinterpret_cast<Item*>(dynamic_shared<ITEMS * kItemBytes>()) + threadIdx.x;
  float* sums = own[3];
  const Place<kUnit> place(s, blockIdx.x);
  const T* from = place.base(x);
  for (int k = 0, at = place.begin; at < place.end; ++k, at += place.step) {
    copy_async_16(items + k * kAttentionThreads, from + item_offset(s, x, at), 16);
  }
  commit_copies();
  Flight<T, kUnit> a, b;
  if (residual.data) b.load(s, place, residual, place.begin, true);
  for (int c = static_cast<int>(threadIdx.x); c < g.channels; c += kAttentionThreads) sums[c] = 0.f;  // of channels that others have
  wait_copies<0>();
  float sum[kUnit] = {};
  for (int k = 0, at = place.begin; at < place.end; ++k, at += place.step) {
    const Item item = items[k * kAttentionThreads];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) sum[i] += to_float(item.v[i]);
  }
  add_threads<kUnit>(s, place, sum, [&](int channel, float total) { sums[channel] = total; });
  hopper::cluster_sync();
  GateVectors v = all.of_image(place.n, g.channels, g.squeezed);
  const bool keeps = hopper::cluster_rank() == 0;
  v.z = own[0], v.pooled = keeps && v.pooled ? v.pooled : own[1], v.gates = keeps && v.gates ? v.gates : own[2];
  gate_forward<kAttentionThreads>(g, [&](int rank, int c) { return hopper::load_of_block(sums + c, rank); }, hopper::kClusterBlocks,
                                  static_cast<float>(s.pixels()), v, parts);
  __syncthreads();
  const Scaling<kUnit> scaling(s, place, v.gates, nullptr);
  int k = 0;
  for (int first = place.begin; first < place.end; first += kStep * place.step) {
    if (residual.data && k > 0) b.load(s, place, residual, first, true);
#pragma unroll
    for (int i = 0; i < kStep; ++i, ++k) {
      if (first + i * place.step < place.end) a.item[i] = items[k * kAttentionThreads];
    }
    scaling.store(s, place, out, first, a, residual.data ? &b : nullptr);
  }
  hopper::cluster_sync();  // others may still read this block's sums
#else
  hopper::not_for_this_gpu();
#endif
}

// Where the form is wanted and the image fits: launches it and returns true.
template <class T, class Launch>
bool attend_by_clusters(const Launch& launch, const AttentionShape& whole, const GateCall<T>& g, const GateVectors& v,
                        const Picture<const T>& x, const Picture<const T>& residual, const Picture<T>& out) {
  if (!launch.hopper()) return false;
  const AttentionShape s = in_cluster(whole, 16 / sizeof(T), g.channels, g.squeezed);
  if (s.steps == 0) return false;
  const auto run = [&]<int ITEMS>() {
    launch.clustered(hopper::kClusterBlocks, &attend_in_cluster<T, ITEMS>, s.blocks(), kAttentionThreads, ITEMS * kItemBytes, s, g, v,
                     by_items(s, x), by_items(s, residual), by_items(s, out));
  };
  s.steps <= kFewItems ? run.template operator()<kFewItems>() : run.template operator()<kMostItems>();
  return true;
}

}  // namespace fastsr::cuda
