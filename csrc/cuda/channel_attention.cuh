// Channel attention and its backward in two passes over the pixels; attention_cluster.cuh has a forward in one.
//
//   sum_pixels     partial[image][strip][channel] = sum of x, or of g * x                    blocks in memory order    ------->
//   gate           partial sums -> gate: a prologue of every block of the second pass where that is little work (RCAN at 48 x 48:
//                  one launch less), else `gate_images`, a block an image. Not the last block of the sums: its counters would have
//                  to be cleared by a launch of their own
//   scale_pixels   out = scale * gate * x + residual, or + shift                             in the reverse order      <-------
//
// A block owns a strip of an image, thread layout in attention_pixels.cuh; four items of 16 bytes a thread and picture are in flight
// (the second pass asks for its first before it computes the gate). Nothing is atomic: results repeat bit for bit.
//
// Lives in   registers: 16 bytes of sums or factors a thread, the items in flight     shared: a block's sums, 8 KB; the gate's vectors
//            L2: what the first pass read last, which the second reads first; residual and output are marked to go first
// Moves      forward x twice, residual, out; backward g twice, x, dx; partial sums are 1/64 of x and less
// Limit      DRAM bandwidth, and below some 20 MB the two launches
//
// predicted / measured, H100 at 3.35 TB/s, with residual; (a) x is read again from DRAM, (b) from L2:
//   16x64x48x48     bf16     14 MB    4 us of traffic + 2 launches      7 us              / not measured yet
//   16x64x48x48     float32  28 MB    8 us + 2 launches                12 us              / not measured yet
//   4x64x256x256    bf16    134 MB    (a) 40 us   (b) 30 us, + 3 us for two launches more / not measured yet
//   4x64x256x256    float32 268 MB    (a) 80 us   (b) 60 us, half of x is in L2: 73 us    / not measured yet
//   to be tried on hardware: 8 items in flight; images in groups that fit L2, both passes group by group; programmatic launches
#pragma once

#include "cuda/attention_cluster.cuh"
#include "cuda/attention_gate.cuh"
#include "cuda/attention_pixels.cuh"

namespace fastsr::cuda {

// partial[n][strip][c] = the sum over a strip of x, or with kProduct of g * x. x is what the second pass reads again.
template <class T, int kUnit, bool kProduct>
__global__ void __launch_bounds__(kAttentionThreads, 2) sum_pixels(AttentionShape s, Picture<const T> x, Picture<const T> g, float* partial) {
  const Place<kUnit> place(s, blockIdx.x);
  float sum[kUnit] = {};
  for (int first = place.begin; first < place.end; first += kInFlight<kUnit> * place.step) {
    Flight<T, kUnit> a, b;
    a.load(s, place, x, first, false);
    if (kProduct) b.load(s, place, g, first, true);
#pragma unroll
    for (int k = 0; k < kInFlight<kUnit>; ++k) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) sum[i] += kProduct ? to_float(a.item[k].v[i]) * to_float(b.item[k].v[i]) : to_float(a.item[k].v[i]);
    }
  }
  float* to = partial + (place.n * s.strips + place.strip) * s.channels;
  add_threads<kUnit>(s, place, sum, [&](int channel, float total) { to[channel] = total; });
}

// Whether every block of an image may compute the gate: the values that it would read are few beside its pixels.
constexpr int kFewSums = 4096;
template <class T>
bool gate_is_small(const AttentionShape& s, const GateCall<T>& g) {
  return g.channels <= kFewChannels && g.squeezed <= kFewChannels &&
         (s.strips + 2 * static_cast<int64_t>(g.squeezed)) * g.channels <= kFewSums;
}

// out = scale * gates * x + residual, or backward, where x is the gradient, + shifts. With partial sums the gate is computed here, and the
// first block of an image leaves its vectors in `all`, where those are not null; without, `all` holds gates and shifts.
template <class T, int kUnit, bool kBackward>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    scale_pixels(AttentionShape s, GateCall<T> g, GateVectors all, const float* partial, Picture<const T> x, Picture<const T> residual,
                 Picture<T> out) {
  __shared__ float parts[kAttentionThreads], own[4][kFewChannels];
  const Place<kUnit> place(s, gridDim.x - 1 - blockIdx.x);
  Flight<T, kUnit> a, b;
  const auto load = [&](int first) {
    a.load(s, place, x, first, true);
    if (residual.data) b.load(s, place, residual, first, true);
  };
  load(place.begin);
  GateVectors v = all.of_image(place.n, g.channels, g.squeezed);
  if (partial) {
    const float* sums = partial + place.n * s.strips * g.channels;
    const auto read = [&](int i, int c) { return sums[i * g.channels + c]; };
    const bool keeps = place.strip == 0 && place.column == 0;
    const auto place_for = [&](float* given, float* instead) { return keeps && given ? given : instead; };
    v.z = place_for(v.z, own[0]);
    if constexpr (kBackward) {
      v.dv = place_for(v.dv, own[1]), v.du = place_for(v.du, own[2]), v.shifts = own[3];
      gate_backward<kAttentionThreads>(g, read, s.strips, s.scale, static_cast<float>(s.pixels()), v, parts);
    } else {
      v.pooled = place_for(v.pooled, own[1]), v.gates = place_for(v.gates, own[2]);
      gate_forward<kAttentionThreads>(g, read, s.strips, static_cast<float>(s.pixels()), v, parts);
    }
    __syncthreads();
  }
  const Scaling<kUnit> scaling(s, place, v.gates, kBackward ? v.shifts : nullptr);
  for (int first = place.begin; first < place.end;) {
    scaling.store(s, place, out, first, a, residual.data ? &b : nullptr);
    first += kInFlight<kUnit> * place.step;
    if (first < place.end) load(first);
  }
}

template <class T>
struct GateGradients {
  T *down_weight, *down_bias, *up_weight, *up_bias;  // null for none
};

// run.template operator()<kUnit>() with the shape's unit.
template <class T, class Run>
void with_unit(const AttentionShape& s, const Run& run) {
  if constexpr (sizeof(T) == 2) {
    if (s.unit == 8) return run.template operator()<8>();
  }
  s.unit == 4 ? run.template operator()<4>() : run.template operator()<1>();
}

// One call's launches: launch(kernel, blocks, threads, shared bytes, arguments...); allocate(bytes) is memory until the end of the call.
template <class T, class Launch, class Allocate>
class Attention {
 public:
  Attention(const Launch& launch, const Allocate& allocate, const AttentionShape& s, const GateCall<T>& g)
      : launch_(launch), allocate_(allocate), s_(s), g_(g), pixels_(static_cast<float>(s.pixels())), partial_(floats(s.strips * s.channels)) {
    s_.streamed = s.batch * s.channels * s.pixels() * static_cast<int64_t>(sizeof(T)) > kStreamed;
  }

  // `pooled` and `gates` may be null.
  void forward(const Picture<const T>& x, const Picture<const T>& residual, const Picture<T>& out, float* pooled, float* gates) const {
    GateVectors v{pooled, gates, nullptr, nullptr, nullptr, nullptr};
    if (attend_by_clusters(launch_, s_, g_, v, x, residual, out)) return;
    const bool inside = gate_is_small(s_, g_);
    if (!inside) {
      v.z = floats(g_.squeezed);
      if (!pooled) v.pooled = floats(g_.channels);
      if (!gates) v.gates = floats(g_.channels);
    }
    sum<false>(x, {});
    if (!inside) gate<false>(v);
    scale<false>(inside, v, x, residual, out);
  }

  // dx may be null, and each of the gradients.
  void backward(const Picture<const T>& grad, const Picture<const T>& x, float* pooled, float* gates, const Picture<T>& dx,
                const GateGradients<T>& to) const {
    const bool inside = dx.data && gate_is_small(s_, g_);
    const GateVectors v{pooled, gates, floats(g_.squeezed), floats(g_.channels), floats(g_.squeezed), floats(g_.channels)};
    sum<true>(grad, x);
    if (!inside) gate<true>(v);
    if (dx.data) scale<true>(inside, v, grad, {}, dx);
    const OuterProduct<T> up{v.dv, v.z, g_.channels, g_.squeezed, to.up_weight, to.up_bias};
    const OuterProduct<T> down{v.du, pooled, g_.squeezed, g_.channels, to.down_weight, to.down_bias};
    const int64_t elements = static_cast<int64_t>(g_.channels) * g_.squeezed * ((up.weight != nullptr) + (down.weight != nullptr));
    launch_(&weight_gradients<T>, divided_up(elements, kOuterThreads), kOuterThreads, 0, up, down, s_.batch);
  }

 private:
  float* floats(int64_t of_image) const { return static_cast<float*>(allocate_(std::max<int64_t>(1, s_.batch) * of_image * 4)); }

  template <bool kProduct>
  void sum(const Picture<const T>& x, const Picture<const T>& g) const {
    with_unit<T>(s_, [&]<int kUnit>() {
      launch_(&sum_pixels<T, kUnit, kProduct>, s_.blocks(), kAttentionThreads, 0, s_, by_items(s_, x), by_items(s_, g), partial_);
    });
  }
  template <bool kBackward>
  void gate(const GateVectors& v) const {
    launch_(&gate_images<T, kBackward>, s_.batch, kGateThreads, 0, g_, partial_, s_.strips, s_.scale, pixels_, v);
  }
  template <bool kBackward>
  void scale(bool inside, const GateVectors& v, const Picture<const T>& x, const Picture<const T>& residual, const Picture<T>& out) const {
    const float* partial = inside ? partial_ : nullptr;
    with_unit<T>(s_, [&]<int kUnit>() {
      launch_(&scale_pixels<T, kUnit, kBackward>, s_.blocks(), kAttentionThreads, 0, s_, g_, v, partial, by_items(s_, x),
              by_items(s_, residual), by_items(s_, out));
    });
  }

  const Launch& launch_;
  const Allocate& allocate_;
  AttentionShape s_;
  GateCall<T> g_;
  float pixels_, *partial_;
};

}  // namespace fastsr::cuda
