// A convolution's description and what becomes of its sums: bias, activation or mask, factors, scales and skips, PixelShuffle, sinks.
// The engines of conv3x3.cuh (mma.sync, fused multiply-adds) and hopper/conv3x3.cuh (wgmma) share it.
#pragma once

#include "cuda/conv3x3_engine.cuh"

namespace fastsr::cuda {

// y = scale2 * (scale * factors * f(convolution + bias) + skip) + skip2, all of y's shape; f is LeakyReLU or, where a mask is given,
// the product with LeakyReLU's derivative at the sign of the mask's values.
template <class T>
struct Conv3x3Call {
  ImageView<const T> x;
  ChannelScaling scaling;  // of x
  const T* packed;  // weights, laid out for the product that convolves
  const T* bias;    // may be null
  int64_t bias_stride;
  ImageView<const T> mask, skip, skip2;
  ImageView<T> out;
  int64_t batch;
  int cin, cout;      // cout counts channels before PixelShuffle
  int height, width;  // of the convolution's output before PixelShuffle
  int upsample, pixel_shuffle;
  float negative_slope, scale, scale2;
  const float* factors;  // [batch][cout], or null for ones; without PixelShuffle only
  int stacked;           // 0: packed for the engines of conv3x3.cuh; else the groups of outputs of hopper/conv3x3.cuh
};

// What may look at the values of y as they are stored; a sink is made for one tile of an engine. All threads that multiply call begin
// before the first value is put and finish after the last one; PixelShuffle and sinks do not go together.
struct NoSink {
  static constexpr bool collects = false;
  template <class Tile>
  static constexpr int shared_bytes = 0;
  __device__ __forceinline__ void begin() const {}
  template <class P>
  __device__ __forceinline__ void put(const P& /* channels side by side */, int /* y */, int /* x */, int /* channel */) const {}
  __device__ __forceinline__ void finish(const TilePosition&, int /* height */, int /* width */, int /* cout */) const {}
};

struct MakeNoSink {
  template <class Tile>
  NoSink operator()() const { return {}; }
};

// From sums to y.
template <class T, class Sink>
struct Conv3x3Epilogue {
  ImageView<const T> mask, skip, skip2;
  ImageView<T> out;
  int cout, pixel_shuffle;
  float negative_slope, scale, scale2;
  const float* factors;
  bool vectors;  // 16-byte runs of channels lie in one pixel of y and start at multiples of 16 bytes
  Sink sink;

  __device__ __forceinline__ float activate(float v) const {
    if (negative_slope == 0.0f) return v <= 0.0f ? 0.0f : v;  // this way round, NaN stays
    return v > 0.0f ? v : v * negative_slope;
  }

  // `to` is the tile's sink, made from `sink`.
  template <int RUN, class To>
  __device__ __forceinline__ void operator()(const float (&sums)[RUN], int64_t image, int y, int x, int channel, To& to) const {
    constexpr int kPack = RUN * sizeof(T) < 16 ? RUN : 16 / sizeof(T);
#pragma unroll
    for (int first = 0; first < RUN; first += kPack) {
      if (vectors && channel + first + kPack <= cout) {
        store<kPack>(sums + first, image, y, x, channel + first, to);
      } else {
        // A rolled loop that picks its value: unrolled, this rare path would be most of the kernel's code.
        const int count = min(kPack, cout - channel - first);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          float sum = sums[first];
#pragma unroll
          for (int other = 1; other < kPack; ++other) sum = i == other ? sums[first + other] : sum;
          store<1>(&sum, image, y, x, channel + first + i, to);
        }
      }
    }
  }

  // COUNT channels that lie side by side in one pixel of y.
  template <int COUNT, class To>
  __device__ __forceinline__ void store(const float* sums, int64_t image, int y, int x, int channel, To& to) const {
    if (pixel_shuffle != 1) {
      const int per_pixel = cout / (pixel_shuffle * pixel_shuffle), sub = channel / per_pixel;
      y = y * pixel_shuffle + sub / pixel_shuffle, x = x * pixel_shuffle + sub % pixel_shuffle;
      channel -= sub * per_pixel;
    }
    float v[COUNT];
    if (mask.data) {
      const auto saved = load<COUNT>(mask, image, y, x, channel);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] = to_float(saved.v[i]) > 0.0f ? sums[i] : sums[i] * negative_slope;
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] = activate(sums[i]);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] *= factors ? scale * factors[image * cout + channel + i] : scale;
    if (skip.data) {
      const auto other = load<COUNT>(skip, image, y, x, channel);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] += to_float(other.v[i]);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] *= scale2;
    if (skip2.data) {
      const auto other = load<COUNT>(skip2, image, y, x, channel);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] += to_float(other.v[i]);
    }
    Pack<T, COUNT> result;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) result.v[i] = from_float<T>(v[i]);
    *reinterpret_cast<Pack<T, COUNT>*>(out.at(image, y, x) + channel) = result;
    to.put(result, y, x, channel);
  }

  template <int COUNT>
  __device__ __forceinline__ Pack<T, COUNT> load(const ImageView<const T>& view, int64_t image, int y, int x, int channel) const {
    return *reinterpret_cast<const Pack<T, COUNT>*>(view.at(image, y, x) + channel);
  }
};

template <class T, class Sink>
Conv3x3Epilogue<T, Sink> epilogue_of(const Conv3x3Call<T>& call, const Sink& sink) {
  const int r = call.pixel_shuffle;
  const bool whole_runs = r == 1 || call.cout / (r * r) % (16 / static_cast<int>(sizeof(T))) == 0;
  const bool vectors = whole_runs && call.out.starts_at_16_bytes() && call.mask.starts_at_16_bytes() && call.skip.starts_at_16_bytes() &&
                       call.skip2.starts_at_16_bytes();  // a view of nothing does
  return {call.mask, call.skip, call.skip2, call.out, call.cout, r, call.negative_slope, call.scale, call.scale2, call.factors, vectors, sink};
}

template <class T>
struct ConvBias {
  const T* data;  // may be null
  int64_t stride;
};

}  // namespace fastsr::cuda
