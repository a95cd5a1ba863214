// The text of the nearest-code search's kernels, for the vectors of vector.h; included inside a namespace.
//
//              LANES codes   LANES codes          A tile: ROWS rows x 2 vectors of codes, summed over all channels in registers.
//            +-------------+-------------+
//     row 0  |   a[0][0]   |   a[0][1]   |        Per channel: 2 loads of codes, ROWS broadcasts of x, 2 * ROWS products.
//       ...  |             |             |        Sums begin with |e|^2 / 2 and codes are negated: no operation after the last channel
//     row R  |   a[R][0]   |   a[R][1]   |        but those that keep each lane's best two scores and the best one's code: 10 per row.
//            +-------------+-------------+
//
// Lives in   registers: sums (24 of 32, 12 of 16)   L1: x of ROWS rows, [channel][row], and what each lane has kept
//            L2: the packed codes that the driver hands over at a time, read once per ROWS rows
// Limit      The FMA units; a row's 10 operations share their ports: 7% at 64 channels, 2% at 256.
// Index      A lane keeps 2 * tile + vector as a float (exact up to 2^24) and is itself the rest of the code's index.

#if FASTSR_LANES == 16
constexpr int ROWS = 12;
#elif FASTSR_LANES == 8
constexpr int ROWS = 6;
#else
constexpr int ROWS = 4;
#endif
constexpr int CODES = 2 * LANES;
constexpr int STATE = 3 * LANES;  // best score, second-best score, index of the best
constexpr int AHEAD = 8 * CODES;  // of the products, from L2 to L1; 10% faster with it

FASTSR_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTSR_INLINE int lanes_left(int64_t size, int64_t from) { return static_cast<int>(smaller(LANES, size - from)); }

// ---- packing

FASTSR_INLINE float as_float(float v) { return v; }
FASTSR_INLINE float as_float(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
#if FASTSR_LANES == 4
FASTSR_INLINE float as_float(Half v) { return widen(v); }
#else
FASTSR_INLINE float as_float(Half v) { return _cvtsh_ss(v.bits); }
#endif

constexpr int64_t COLUMNS = 64;  // at most, of `mean`

template <class T>
static float mean(const void* codes, int64_t count, int64_t channels, int64_t first, int64_t columns, float* to) {
  double sums[COLUMNS] = {};
  float largest[COLUMNS] = {};
  const T* code = static_cast<const T*>(codes) + first;
  for (int64_t k = 0; k < count; ++k, code += channels) {
    for (int64_t c = 0; c < columns; ++c) {
      const float v = as_float(code[c]), magnitude = __builtin_fabsf(v);
      sums[c] += v;
      largest[c] = magnitude > largest[c] ? magnitude : largest[c];
    }
  }
  float most = 0.f;
  for (int64_t c = 0; c < columns; ++c) {
    to[first + c] = static_cast<float>(sums[c] / static_cast<double>(count));
    if (!(sums[c] - sums[c] == 0)) return __builtin_inff();
    most = largest[c] > most ? largest[c] : most;
  }
  return most;
}

template <class T>
FASTSR_INLINE const T* row_of(const RowView& x, int64_t i) { return static_cast<const T*>(x.data) + x.offsets[i]; }

// LANES channels of a row from `c` on, minus the mean, times the scale; `count` of them exist.
template <class T>
FASTSR_INLINE Vector load_channels(const RowView& x, int64_t row, int64_t c, int count, const float* mean, float scale) {
  const T* from = row_of<T>(x, row) + c * x.channel;
  Vector v;
  if (x.channel == 1) {
    v = load_as(from, count);
  } else {
    T gathered[LANES];
    for (int i = 0; i < count; ++i) gathered[i] = from[i * x.channel];
    v = load_as(gathered, count);
  }
  return mul(fma(load_as(mean + c, count), set1(-1.f), v), set1(scale));
}

// LANES vectors; at most ROWS of the lanes that come out are of use.
FASTSR_INLINE void transpose(Vector* v) {
#if FASTSR_LANES == 16
  transpose(reinterpret_cast<__m512i*>(v));
#else
  alignas(32) float in[LANES][LANES], out[LANES];
  for (int i = 0; i < LANES; ++i) store(in[i], v[i]);
  for (int j = 0; j < LANES; ++j) {
    for (int i = 0; i < LANES; ++i) out[i] = in[i][j];
    v[j] = load(out);
  }
#endif
}

template <class T>
static void pack_rows(const RowView& x, int64_t channels, const float* mean, const float* scales, float* to, float* squares) {
  Vector sum = set1(0.f);
  if (x.adjacent) {
    alignas(64) float by_row[LANES] = {};
    for (int64_t i = 0; i < x.count; ++i) by_row[i] = scales[i];
    const Vector scale = load(by_row);
    const T* from = row_of<T>(x, 0);
    for (int64_t c = 0; c < channels; ++c, from += x.channel, to += ROWS) {
      const Vector v = mul(fma(set1(mean[c]), set1(-1.f), load_as(from, static_cast<int>(x.count))), scale);
      store_as(to, v, ROWS);
      sum = fma(v, v, sum);
    }
  } else {
    for (int64_t c = 0; c < channels; c += LANES) {
      const int count = lanes_left(channels, c);
      Vector v[LANES];
      for (int i = 0; i < LANES; ++i) v[i] = i < x.count ? load_channels<T>(x, i, c, count, mean, scales[i]) : set1(0.f);
      transpose(v);
      for (int j = 0; j < count; ++j, to += ROWS) {
        store_as(to, v[j], ROWS);
        sum = fma(v[j], v[j], sum);
      }
    }
  }
  store_as(squares, sum, ROWS);
}

template <class T>
static void pack_codes(const RowView& codes, int64_t channels, const float* mean, const float* scales, float* to, float* half) {
  for (int64_t i = 0; i < CODES; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < channels; c += LANES) {
      const int count = lanes_left(channels, c);
      alignas(64) float values[LANES] = {};
      if (i < codes.count) store(values, load_channels<T>(codes, i, c, count, mean, scales[i]));
      for (int j = 0; j < count; ++j) {
        to[(c + j) * CODES + i] = -values[j];
        sum += static_cast<double>(values[j]) * values[j];
      }
    }
    half[i] = i < codes.count ? static_cast<float>(0.5 * sum) : __builtin_inff();
  }
}

// ---- products

FASTSR_INLINE void scores(const float* x, const float* codes, const float* half, int64_t channels, Vector (&a)[ROWS][2]) {
  const Vector h0 = load(half), h1 = load(half + LANES);
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) a[i][0] = h0, a[i][1] = h1;
  for (int64_t c = 0; c < channels; ++c, x += ROWS, codes += CODES) {
    const Vector e0 = load(codes), e1 = load(codes + LANES);
    __builtin_prefetch(codes + AHEAD), __builtin_prefetch(codes + AHEAD + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      const Vector b = set1(x[i]);
      a[i][0] = fma(b, e0, a[i][0]);
      a[i][1] = fma(b, e1, a[i][1]);
    }
  }
}

static void reset(float* state) {
  for (int i = 0; i < ROWS; ++i, state += STATE) {
    store(state, set1(__builtin_inff()));
    store(state + LANES, set1(__builtin_inff()));
    store(state + 2 * LANES, set1(0.f));
  }
}

static void scan(const float* x, const PackedCodes& codes, int64_t channels, float* state, Ahead ahead) {
  const int64_t step = (ahead.bytes / codes.tiles + 63) / 64 * 64;
  for (int64_t t = 0; t < codes.tiles; ++t) {
    for (int64_t i = t * step; i < smaller(ahead.bytes, (t + 1) * step); i += 64) __builtin_prefetch(ahead.data + i, 0, 2);
    Vector a[ROWS][2];
    scores(x, codes.values + t * channels * CODES, codes.half + t * CODES, channels, a);
    __asm__ volatile("" ::: "memory");  // else GCC copies the whole state to the stack and back
    const Vector index0 = set1(static_cast<float>(2 * (codes.first + t))), index1 = add(index0, set1(1.f));
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      float* kept = state + i * STATE;
      Vector best = load(kept), second = load(kept + LANES), index = load(kept + 2 * LANES);
      second = minimum(second, maximum(a[i][0], best));
      index = where_less(a[i][0], best, index0, index);
      best = minimum(a[i][0], best);
      second = minimum(second, maximum(a[i][1], best));
      index = where_less(a[i][1], best, index1, index);
      best = minimum(a[i][1], best);
      store(kept, best), store(kept + LANES, second), store(kept + 2 * LANES, index);
    }
  }
}

static void finish(const float* state, float* first, float* second, int64_t* index) {
  for (int i = 0; i < ROWS; ++i, state += STATE) {
#if FASTSR_LANES == 16
    const Vector best = load(state);
    first[i] = _mm512_reduce_min_ps(best);
    const uint32_t winners = lanes_at_most(best, set1(first[i]));
    const int lane = winners ? __builtin_ctz(winners) : 0;
    const Vector others = _mm512_mask_mov_ps(best, static_cast<__mmask16>(1u << lane), set1(__builtin_inff()));
    second[i] = _mm512_reduce_min_ps(minimum(others, load(state + LANES)));
#else
    int lane = 0;
    for (int j = 1; j < LANES; ++j) lane = state[j] < state[lane] ? j : lane;
    first[i] = state[lane], second[i] = state[LANES + lane];
    for (int j = 0; j < LANES; ++j) {
      const float next = j == lane ? state[LANES + j] : state[j];
      second[i] = next < second[i] ? next : second[i];
    }
#endif
    index[i] = static_cast<int64_t>(state[2 * LANES + lane]) * LANES + lane;
  }
}

FASTSR_INLINE void append(Candidates* row, int64_t code) {
  const int64_t at = row->count++;
  if (at < Candidates::kMost) row->codes[at] = static_cast<int32_t>(code);
}

static bool kept(const float* state, Candidates* row) {
  for (int lane = 0; lane < LANES; ++lane) {
    if (state[LANES + lane] <= row->limit) return false;
    if (state[lane] <= row->limit) append(row, static_cast<int64_t>(state[2 * LANES + lane]) * LANES + lane);
  }
  return true;
}

static void collect(const float* x, const PackedCodes& codes, int64_t channels, Candidates* rows) {
  for (int64_t t = 0; t < codes.tiles; ++t) {
    Vector a[ROWS][2];
    scores(x, codes.values + t * channels * CODES, codes.half + t * CODES, channels, a);
    for (int i = 0; i < ROWS; ++i) {
      const Vector limit = set1(rows[i].limit);
      uint64_t found = lanes_at_most(a[i][0], limit) | static_cast<uint64_t>(lanes_at_most(a[i][1], limit)) << LANES;
      for (; found; found &= found - 1) append(rows + i, (codes.first + t) * CODES + __builtin_ctzll(found));
    }
  }
}

// ---- float64 distances, in the order of summation that fastsr/kernels/vq_nearest/reference.py defines

typedef double Eight __attribute__((vector_size(64)));

FASTSR_INLINE double fold(Eight v) {
  const double a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
  return (a + c) + (b + d);
}

// Eight channels, of which `count` exist; the others are zero.
template <class T>
FASTSR_INLINE Eight eight(const T* from, int64_t count) {
#if FASTSR_LANES == 16
  if (count > 8) count = 8;
  return (Eight)_mm512_cvtps_pd(_mm512_castps512_ps256(load_as(from, static_cast<int>(count))));
#else
  Eight v = {};
  if (count >= 8) {
    for (int i = 0; i < 8; ++i) v[i] = as_float(from[i]);
  } else {
    for (int i = 0; i < count; ++i) v[i] = as_float(from[i]);
  }
  return v;
#endif
}

template <class T>
static void widen_row(const void* row, int64_t channel, int64_t channels, double norm, double* to) {
  const T* from = static_cast<const T*>(row);
  for (int64_t c = 0; c < channels; ++c) {
    const double v = as_float(from[c * channel]);
    to[c] = norm != 0 ? v / norm : v;
  }
  for (int64_t c = channels; c % 8 != 0; ++c) to[c] = 0;
}

static double norm(const double* row, int64_t channels) {
  Eight sum = {};
  for (int64_t c = 0; c < channels; c += 8) {
    Eight v;
    __builtin_memcpy(&v, row + c, sizeof v);
    sum += v * v;
  }
  return __builtin_sqrt(fold(sum));
}

template <class T>
FASTSR_INLINE double one_distance(const double* row, const T* code, int64_t channels, double norm) {
  Eight sum = {};
  for (int64_t c = 0; c < channels; c += 8) {
    Eight v, e = eight(code + c, channels - c);
    if (norm != 0) e /= norm;
    __builtin_memcpy(&v, row + c, sizeof v);
    v -= e;
    sum += v * v;
  }
  return fold(sum);
}

template <class T>
static double distance(const double* row, const void* code, int64_t channels, double norm) {
  return one_distance(row, static_cast<const T*>(code), channels, norm);
}

template <class T>
static Nearest nearest(const double* row, const void* codes, int64_t count, int64_t channels, const double* norms) {
  const T* code = static_cast<const T*>(codes);
  Nearest found{0, one_distance(row, code, channels, norms ? norms[0] : 0)};
  for (int64_t k = 1; k < count && found.distance == found.distance; ++k) {  // NaN is smaller than all
    code += channels;
    const double d = one_distance(row, code, channels, norms ? norms[k] : 0);
    if (!(d >= found.distance)) found = {k, d};
  }
  return found;
}

extern const VqKernel vq = {
    FASTSR_NAME, ROWS, CODES, STATE, FASTSR_LANES == 4 ? 2 : 1,
    {&mean<float>, &mean<BFloat16>, &mean<Half>},
    {&pack_rows<float>, &pack_rows<BFloat16>, &pack_rows<Half>},
    {&pack_codes<float>, &pack_codes<BFloat16>, &pack_codes<Half>},
    &reset, &scan, &finish, &kept, &collect,
    {&widen_row<float>, &widen_row<BFloat16>, &widen_row<Half>}, &norm,
    {&distance<float>, &distance<BFloat16>, &distance<Half>},
    {&nearest<float>, &nearest<BFloat16>, &nearest<Half>},
};
