// Pictures as channel attention's kernels see them: rows of units, cut into strips for the blocks. Channels-last and NCHW by one text.
//
//     channels-last   an item is a pixel; `across` threads      NCHW   an item is a unit of a plane; `across` threads share
//                     share its channels                               a plane, the others take further planes
//         item  ty 0   | tx 0 | tx 1 | ... | tx 7 |                plane ty 0   | tx 0 | tx 1 | ... | tx 127 |
//               ty 1   |      |      |     |      |                      ty 1   |      |      |     |        |
//                ...
//
// A unit is 16 bytes where every picture allows it; else 4 elements (8 bytes: 180 channels of bf16); else one element.
// The cut follows the shape of an image alone: bits depend neither on the batch nor on the GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/numeric.cuh"

namespace fastsr::cuda {

constexpr int kAttentionThreads = 256;
constexpr int kMostStrips = 512;  // blocks of an image, about: four on each of 132 multiprocessors, and few enough to be added up in 2 us
constexpr int64_t kStreamed = 24 << 20;  // bytes of a picture for which an output would drive the inputs out of the L2 cache

// Loads of a thread that are under way together.
template <int kUnit>
constexpr int kInFlight = kUnit == 1 ? 8 : 4;

// A tensor's address and strides, in elements.
template <class T>
struct Picture {
  T* data = nullptr;  // null for none
  int64_t n = 0, c = 0, h = 0, w = 0;
};

// How all pictures of a call are cut.
struct AttentionShape {
  int64_t batch;
  int channels, height, width;
  bool planar;    // contiguous planes; else channels side by side
  bool joined;    // items lie at equal distances, without a gap between rows
  bool streamed;  // the output is too large for the L2 cache
  int unit, items;
  int across, columns, strips, steps;  // a strip has `steps` items for each thread
  float scale;                         // of the gated branch

  __host__ __device__ int pixels() const { return height * width; }
  __host__ __device__ int rows() const { return kAttentionThreads / across; }
  __host__ __device__ int step() const { return planar ? across : rows(); }  // items that a block takes at once
  int64_t blocks() const { return batch * columns * strips; }
};

inline int divided_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

inline int power_of_two(int64_t least, int most) {
  int p = 1;
  while (p < least && p < most) p *= 2;
  return p;
}

// The largest unit that serves for a picture.
template <class T>
int unit_of(const AttentionShape& s, const Picture<T>& p) {
  if (!p.data) return 16 / sizeof(T);
  const auto fits = [&](int64_t unit) {
    const bool inside = s.planar ? s.pixels() % unit == 0 && (s.channels == 1 || p.c % unit == 0)
                                 : s.channels % unit == 0 && (s.height == 1 || p.h % unit == 0) && (s.width == 1 || p.w % unit == 0);
    return inside && (s.batch == 1 || p.n % unit == 0) && reinterpret_cast<uintptr_t>(p.data) % (unit * sizeof(T)) == 0;
  };
  for (int unit = 16 / sizeof(T); unit >= 4; unit /= 2) {
    if (fits(unit)) return unit;
  }
  return 1;
}

template <class T>
bool rows_join(const AttentionShape& s, const Picture<T>& p) {
  return !p.data || s.planar || s.height == 1 || s.width == 1 || p.h == s.width * p.w;
}

// From an item to the next it is w, from a channel to the next c.
template <class T>
Picture<T> by_items(const AttentionShape& s, Picture<T> p) {
  if (s.planar) p.w = s.unit;
  if (!s.planar) p.c = 1;
  if (!s.planar && s.width == 1) p.w = p.h;
  return p;
}

template <class... Pictures>
AttentionShape attention_shape(int64_t batch, int channels, int height, int width, bool planar, float scale, const Pictures&... pictures) {
  AttentionShape s{batch, channels, height, width, planar, true, false, 1, 0, 1, 1, 1, 1, scale};
  s.unit = std::min({unit_of(s, pictures)...});
  s.joined = (rows_join(s, pictures) && ...);
  const int flight = s.unit == 1 ? kInFlight<1> : kInFlight<4>;
  if (planar) {
    s.items = s.pixels() / s.unit;
    s.across = std::max(32, power_of_two(divided_up(s.items, flight), kAttentionThreads));
    s.columns = divided_up(channels, s.rows());
  } else {
    s.items = s.pixels();
    s.across = power_of_two(channels / s.unit, 32);
    s.columns = divided_up(channels / s.unit, s.across);
  }
  const int64_t in_flight = flight * s.step();
  s.steps = flight * divided_up(s.items, in_flight * std::max(1, kMostStrips / s.columns));
  s.strips = divided_up(s.items, static_cast<int64_t>(s.step()) * s.steps);
  return s;
}

// A thread's share of a strip: the items begin, begin + step, ... < end of `channel` (and, channels-last, kUnit - 1 more).
template <int kUnit>
struct Place {
  int64_t n;
  int channel, column, strip, tx, ty, begin, end, step;

  __device__ __forceinline__ Place(const AttentionShape& s, unsigned block) {
    strip = static_cast<int>(block % s.strips), block /= s.strips;
    column = static_cast<int>(block % s.columns);
    n = block / s.columns;
    tx = static_cast<int>(threadIdx.x) % s.across, ty = static_cast<int>(threadIdx.x) / s.across;
    step = s.step();
    channel = s.planar ? column * s.rows() + ty : (column * s.across + tx) * kUnit;
    const int64_t length = static_cast<int64_t>(step) * s.steps, first = strip * length;
    begin = static_cast<int>(first) + (s.planar ? tx : ty);
    end = static_cast<int>(min(first + length, static_cast<int64_t>(s.items)));
    if (channel >= s.channels) end = begin;
  }
  template <class T>
  __device__ __forceinline__ T* base(const Picture<T>& p) const {
    return p.data + n * p.n + channel * p.c;
  }
};

// Elements from a picture's first item to `item`.
template <class T>
__device__ __forceinline__ int64_t item_offset(const AttentionShape& s, const Picture<T>& p, int item) {
  if (s.joined) return item * p.w;
  const unsigned row = static_cast<unsigned>(item) / static_cast<unsigned>(s.width);
  return row * p.h + (item - static_cast<int64_t>(row) * s.width) * p.w;
}

// The items first, first + step, ... of one picture that a thread loads together; zeros where there is no item.
template <class T, int kUnit>
struct Flight {
  Pack<T, kUnit> item[kInFlight<kUnit>];

  // `once`: the picture is not read again soon.
  __device__ __forceinline__ void load(const AttentionShape& s, const Place<kUnit>& place, const Picture<const T>& p, int first, bool once) {
    const T* base = place.base(p);
#pragma unroll
    for (int k = 0; k < kInFlight<kUnit>; ++k) {
      const int at = first + k * place.step;
      if (at < place.end) {
        const auto* from = reinterpret_cast<const Pack<T, kUnit>*>(base + item_offset(s, p, at));
        item[k] = once ? load_once(from) : *from;
      } else {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) item[k].v[i] = from_float<T>(0.f);
      }
    }
  }
};

// A thread's factors, and what it adds where there is no residual.
template <int kUnit>
struct Scaling {
  float factor[kUnit] = {}, shift[kUnit] = {};

  __device__ __forceinline__ Scaling(const AttentionShape& s, const Place<kUnit>& place, const float* gates, const float* shifts) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int c = s.planar ? place.channel : place.channel + i;
      if (c >= s.channels) continue;
      factor[i] = s.scale * gates[c];
      if (shifts) shift[i] = shifts[c];
    }
  }
  // Writes the items first, first + step, ...
  template <class T>
  __device__ __forceinline__ void store(const AttentionShape& s, const Place<kUnit>& place, const Picture<T>& out, int first,
                                        const Flight<T, kUnit>& x, const Flight<T, kUnit>* residual) const {
    T* base = place.base(out);
#pragma unroll
    for (int k = 0; k < kInFlight<kUnit>; ++k) {
      const int at = first + k * place.step;
      if (at >= place.end) continue;
      Pack<T, kUnit> y;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        y.v[i] = from_float<T>(factor[i] * to_float(x.item[k].v[i]) + (residual ? to_float(residual->item[k].v[i]) : shift[i]));
      }
      auto* to = reinterpret_cast<Pack<T, kUnit>*>(base + item_offset(s, out, at));
      s.streamed ? store_once(to, y) : void(*to = y);
    }
  }
};

// Adds up the threads' sums in an order of their own: finish(channel, sum) once for every channel of the block.
template <int kUnit, class Finish>
__device__ __forceinline__ void add_threads(const AttentionShape& s, const Place<kUnit>& place, float (&sum)[kUnit], Finish finish) {
  __shared__ float sums[kAttentionThreads * kUnit];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  // A row of `width` values for each of `parts` parts.
  int width, parts;
  if (s.planar) {
#pragma unroll
    for (int i = 1; i < kUnit; ++i) sum[0] += sum[i];
    for (int mask = min(s.across, 32) / 2; mask > 0; mask /= 2) sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], mask);
    width = s.rows(), parts = max(1, s.across / 32);
    if (place.tx % 32 == 0) sums[place.tx / 32 * width + place.ty] = sum[0];
  } else {
    for (int mask = 16; mask >= s.across; mask /= 2) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], mask);
    }
    width = s.across * kUnit, parts = kAttentionThreads / 32;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (lane < s.across) sums[warp * width + place.tx * kUnit + i] = sum[i];
    }
  }
  __syncthreads();
  const int channel = place.column * width + thread;
  if (thread >= width || channel >= s.channels) return;
  float total = 0.f;
  for (int part = 0; part < parts; ++part) total += sums[part * width + thread];
  finish(channel, total);
}

}  // namespace fastsr::cuda
