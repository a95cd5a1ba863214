// Sums, dot products and scalings over channels: the text that every instruction set compiles for itself.
//
// A vector is LANES channels of a pixel. Long sums run in several chains, which hides the additions' latency and keeps their
// rounding small; the order is fixed by the sizes alone.

FASTSR_INLINE int lanes_from(int64_t channels, int64_t c) { return channels - c < LANES ? static_cast<int>(channels - c) : LANES; }

template <class T>
static void sum_row(const void* row, int64_t pixel, int64_t width, int64_t channels, float* to) {
  const int64_t inner = width - 2;  // pixels between the first and the last
  for (int64_t c = 0; c < channels; c += LANES) {
    const int count = lanes_from(channels, c);
    const T* p = static_cast<const T*>(row) + c;
    const Vector first = load_as(p, count), last = load_as(p + (width - 1) * pixel, count);
    Vector left = set1(0.f), middle = first, right = left;
    if (width > 1) {
      Vector sums[4] = {left, left, left, left};
      int64_t i = 0;
      for (p += pixel; i + 8 <= inner; i += 8, p += 8 * pixel) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sums[k] = add(sums[k], add(load_as(p + k * pixel, count), load_as(p + (k + 4) * pixel, count)));
      }
      for (; i < inner; ++i, p += pixel) sums[0] = add(sums[0], load_as(p, count));
      const Vector between = add(add(sums[0], sums[1]), add(sums[2], sums[3]));
      left = add(first, between), right = add(between, last), middle = add(left, last);
    }
    store_as(to + c, left, count);
    store_as(to + channels + c, middle, count);
    store_as(to + 2 * channels + c, right, count);
  }
}

FASTSR_INLINE float sum_lanes(Vector v) {
  alignas(64) float lanes[LANES];
  store(lanes, v);
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class T>
static void dots(const void* a, const float* b, int64_t b_row, int64_t rows, int64_t length, float* to) {
  constexpr int64_t kChain = 128;  // values whose sum is closed before it is added to the rest
  const T* p = static_cast<const T*>(a);
  for (int64_t row = 0; row < rows; ++row, p += length, b += b_row) {
    Vector total = set1(0.f);
    for (int64_t begin = 0; begin < length; begin += kChain) {
      const int64_t end = length - begin < kChain ? length : begin + kChain;
      Vector sums[2] = {set1(0.f), set1(0.f)};
      int64_t i = begin;
      for (; i + 2 * LANES <= end; i += 2 * LANES) {
        sums[0] = fma(load_as(p + i, LANES), load(b + i), sums[0]);
        sums[1] = fma(load_as(p + i + LANES, LANES), load(b + i + LANES), sums[1]);
      }
      for (; i < end; i += LANES) {
        const int count = lanes_from(end, i);
        sums[0] = fma(load_as(p + i, count), load_as(b + i, count), sums[0]);
      }
      total = add(total, add(sums[0], sums[1]));
    }
    to[row] = sum_lanes(total);
  }
}

static void accumulate(float* sums, float s, const float* a, float t, const float* b, int64_t length) {
  const Vector scale_a = set1(s), scale_b = set1(t);
  for (int64_t i = 0; i < length; i += LANES) {
    const int count = lanes_from(length, i);
    store_as(sums + i, fma(scale_a, load_as(a + i, count), fma(scale_b, load_as(b + i, count), load_as(sums + i, count))), count);
  }
}

template <class T, class To>
static void scale_row(const void* from, int64_t from_pixel, const float* scale, const float* shift, int64_t pixels, int64_t channels,
                      void* to, int64_t to_pixel) {
  for (int64_t c = 0; c < channels; c += LANES) {
    const int count = lanes_from(channels, c);
    const Vector factor = load_as(scale + c, count), added = load_as(shift + c, count);
    const T* p = static_cast<const T*>(from) + c;
    To* out = static_cast<To*>(to) + c;
    for (int64_t i = 0; i < pixels; ++i, p += from_pixel, out += to_pixel) store_as(out, fma(factor, load_as(p, count), added), count);
  }
}

extern const ChannelKernel channels = {
    {&sum_row<float>, &sum_row<BFloat16>, &sum_row<Half>},
    {&dots<float>, &dots<BFloat16>, &dots<Half>},
    &accumulate,
    {{&scale_row<float, float>, nullptr}, {&scale_row<BFloat16, float>, &scale_row<BFloat16, BFloat16>}, {&scale_row<Half, float>, nullptr}},
};
