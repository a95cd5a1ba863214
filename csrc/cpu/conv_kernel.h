// One row of a 3x3 convolution: the text that every instruction set compiles for itself.
//
//     columns of one input row          -1  0  1  2  3 ...          A register tile is PIXELS x VECTORS accumulators:
//     one input channel, broadcast       |  |  |  |                 12 x 2 on AVX-512 (32 output channels), 12 x 1 on
//                                        +--+--+  |                 AVX2, 8 x 1 elsewhere. Per row of taps and input
//     pixel 0 of the tile                w0 w1 w2 |                 channel, the weights of all three taps stay in
//     pixel 1 of the tile                   w0 w1 w2                registers and each column is broadcast once:
//       ...                                                         20 loads for 72 multiply-adds on AVX-512.
//
// Lives in   registers: the tile, 3 x VECTORS vectors of weights    L1: 3 x 14 pixels of input, 10.5 KB at 64 channels
//            L2: the group's weights, 9 * C * 128 bytes (72 KB at 64 channels), read at 11 bytes a cycle
// Borders    The first and the last column of a tile have address registers of their own, which point to zeros where the row
//            ends; rows outside the image are left out. So no buffer needs a border, and nothing is copied.
// Tails      A row is cut into tiles of q and q + 1 pixels (48 = 4 x 12): none overlaps another.
// Order      The sum over column and at most 96 channels (equal parts) for each row of taps, then the sum of those: the same for
//            every tile, segment and thread. (One chain of additions for all would more than double the rounding error.)
// Limit      The FMA units: 9 * C * O multiply-adds per pixel.
//
// predicted / measured, share of the FMA roof of one core (230 GFLOP/s, AVX-512 at 3.6 GHz, L2 of 2 MB), W = 48 and 256:
//   v1 one tap at a time, 14 x 2 accumulators              95% / 64 channels: 78%, 192 channels: 84%; 55% at 8 channels
//   v2 three taps at a time (this file)                    95% / 87%, 90%; 59%
//   v3 as v2, branch-free epilogue, no zeroing of sums     95% / 87%, 88-94%; 77%
//   the whole operator on cold pictures, one thread        90% / 70-75% at 64 channels, 79-83% at 192 (5% less without prefetch);
//                                        two threads       90% / 76-82%, 80-84%; eager channels-last of torch 2.13 beside them 70-81%
//   v4 outputs and skips fetched too, between the parts    store misses: a lone store that misses costs 15 ns beside FMAs, one that
//                                                          was fetched 2-3 ns  +4% / +3-8% at 160 of 192 channels, 0-6% at 64
//   one part of all tiles of 4 or 8 before the next part   weights from L1 / 0.98-1.03 of v3: weights from L2 cost nothing: dropped
//   fetches at every 16th step, not between the parts      smoother / 2-3% less when all is in L2: dropped
//   v5 a function for what the epilogue reads, its fields  half the epilogue, which is 3.5% of a bfloat16 block
//      found once a row and group, shuffled stores fetched / 2.5%; PixelShuffle's convolution 3% less
//   v6 up to 5 outputs with their three taps abreast       14 of 36 multiply-adds / 64 -> 3 outputs at 512x512: float32 23 -> 10.5 ms,
//                                                          bfloat16 11.7 -> 6.0 (two threads of a Zen 4)
// Measured with variants in turn in one process on a shared machine, whose L3 latency changed between 49 and 144 ns.

// What a step takes: one input channel in float32, or two in bfloat16. Both are four bytes.
struct Floats {
  static constexpr int kUnit = 1;
  using Operand = Vector;
  FASTSR_INLINE Operand weights(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  FASTSR_INLINE Operand broadcast(const char* p) { return set1(*reinterpret_cast<const float*>(p)); }
  FASTSR_INLINE Vector multiply_add(Operand x, Operand w, Vector sum) { return fma(x, w, sum); }
};

constexpr int VECTORS = LANES == 16 ? 2 : 1, GROUP = VECTORS * LANES;
constexpr int PIXELS = LANES == 4 ? 8 : 12;
constexpr int64_t CHUNK = 96;  // steps in one chain of additions

struct TileInput {
  const char* row[3];  // the tile's first pixel in the rows above, at and below; null outside the image
  int64_t pixel;       // bytes from a pixel to the next
  int64_t steps;       // per pixel
  const char* weights;
  const char* zeros;
  int64_t outputs;   // abreast
  bool left, right;  // the tile holds the row's first, last pixel
  // Memory to be asked for meanwhile, some of its pixels before each part of the sum: of all at once, the loads of weights would wait.
  struct Fetch {
    const char* first;
    int64_t pixel, bytes;
    bool write;
  } fetches[5];
  int fetch_count;
};

// The address of pixel i of a run of at most six, with few enough registers that none is spilled.
FASTSR_INLINE const char* pixel_at(const char* p, int i, int64_t s, int64_t s3, int64_t s5) {
  switch (i) {
    case 0: return p;
    case 1: return p + s;
    case 2: return p + 2 * s;
    case 3: return p + s3;
    case 4: return p + 4 * s;
    default: return p + s5;
  }
}

FASTSR_INLINE void fetch(const TileInput::Fetch& f, int64_t from, int64_t to) {
  for (const char *p = f.first + from * f.pixel, *end = f.first + to * f.pixel; p != end; p += f.pixel) {
    for (int64_t b = 0; b < f.bytes; b += 64) f.write ? __builtin_prefetch(p + b, 1, 3) : __builtin_prefetch(p + b, 0, 2);
  }
}

template <class Op, int P, int V>
static __attribute__((noinline)) void tile(const TileInput& in, float* sums) {
  constexpr int64_t kVector = LANES * 4;
  const int64_t s = in.pixel, s3 = 3 * s, s5 = 5 * s;
  const int64_t chunks = (in.steps + CHUNK - 1) / CHUNK;
  bool begun = false;
  for (int64_t part = 0; part < 3 * chunks; ++part) {
    const int64_t dy = part / chunks, begin = in.steps * (part % chunks) / chunks, end = in.steps * (part % chunks + 1) / chunks;
    for (int i = 0; i < in.fetch_count; ++i) fetch(in.fetches[i], P * part / (3 * chunks), P * (part + 1) / (3 * chunks));
    if (!in.row[dy]) continue;
    Vector sum[P][V];
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = set1(0.f);
    }
    const char *low = in.row[dy] + 4 * begin, *high = low + 6 * s;  // from here columns 0..5 and 6..11 are found
    const char* first = in.left ? in.zeros : low - s;
    const char* last = in.right ? in.zeros : low + P * s;
    const char* w = in.weights + (dy * in.steps + begin) * (3 * V * kVector);
    for (int64_t k = begin; k < end; ++k) {
      typename Op::Operand weights[3][V];
#pragma GCC unroll 3
      for (int dx = 0; dx < 3; ++dx) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) weights[dx][v] = Op::weights(w + (dx * V + v) * kVector);
      }
#pragma GCC unroll 16
      for (int c = -1; c <= P; ++c) {
        const char* p = c == -1 ? first : c == P ? last : c < 6 ? pixel_at(low, c, s, s3, s5) : pixel_at(high, c - 6, s, s3, s5);
        const typename Op::Operand x = Op::broadcast(p);
#pragma GCC unroll 3
        for (int dx = 2; dx >= 0; --dx) {
          const int i = c + 1 - dx;  // the pixel to which this column is tap dx
          if (i < 0 || i >= P) continue;
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sum[i][v] = Op::multiply_add(x, weights[dx][v], sum[i][v]);
        }
      }
      first += 4, low += 4, high += 4, last += 4, w += 3 * V * kVector;
    }
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* to = sums + (i * V + v) * LANES;
        store(to, begun ? add(load(to), sum[i][v]) : sum[i][v]);
      }
    }
    begun = true;
  }
}

// The same for few outputs, whose three taps of a row fill one vector: each column is multiplied once for all three pixels that see it,
// and a pixel's sum is gathered from three columns' vectors at the end.
template <class Op, int P>
static __attribute__((noinline)) void tile_abreast(const TileInput& in, float* sums) {
  const int64_t s = in.pixel, chunks = (in.steps + CHUNK - 1) / CHUNK;
  alignas(64) float columns[(P + 3) * LANES];  // of the columns -1 to P; one more vector for loads that end beyond
  bool begun = false;
  for (int64_t part = 0; part < 3 * chunks; ++part) {
    const int64_t dy = part / chunks, begin = in.steps * (part % chunks) / chunks, end = in.steps * (part % chunks + 1) / chunks;
    for (int i = 0; i < in.fetch_count; ++i) fetch(in.fetches[i], P * part / (3 * chunks), P * (part + 1) / (3 * chunks));
    if (!in.row[dy]) continue;
    Vector sum[P + 2];
#pragma GCC unroll 16
    for (int i = 0; i < P + 2; ++i) sum[i] = set1(0.f);
    const char *low = in.row[dy] + 4 * begin, *high = low + 6 * s;
    const char* first = in.left ? in.zeros : low - s;
    const char* last = in.right ? in.zeros : low + P * s;
    const char* w = in.weights + (dy * in.steps + begin) * (LANES * 4);
    for (int64_t k = begin; k < end; ++k) {
      const typename Op::Operand weights = Op::weights(w);
#pragma GCC unroll 16
      for (int c = -1; c <= P; ++c) {
        const char* p = c == -1 ? first : c == P ? last : c < 6 ? pixel_at(low, c, s, 3 * s, 5 * s) : pixel_at(high, c - 6, s, 3 * s, 5 * s);
        sum[c + 1] = Op::multiply_add(Op::broadcast(p), weights, sum[c + 1]);
      }
      first += 4, low += 4, high += 4, last += 4, w += LANES * 4;
    }
#pragma GCC unroll 16
    for (int i = 0; i < P + 2; ++i) store(columns + i * LANES, begun ? add(load(columns + i * LANES), sum[i]) : sum[i]);
    begun = true;
  }
  store(columns + (P + 2) * LANES, set1(0.f));
  for (int i = 0; i < P; ++i) {
    const float* c = columns + i * LANES;
    store(sums + i * LANES, add(add(load(c), load(c + LANES + in.outputs)), load(c + 2 * (LANES + in.outputs))));
  }
}

template <class T>
FASTSR_INLINE const T* channel(const void* row, int64_t offset) {
  return row ? static_cast<const T*>(row) + offset : nullptr;
}

// The lanes of `count` channels from `o` on if they do not lie side by side, else null; sets the offset to start from.
FASTSR_INLINE const int64_t* scattered(const int64_t* lanes, int64_t o, int count, int64_t* offset) {
  if (!lanes) return nullptr;
  *offset = lanes[o];
  for (int i = 1; i < count; ++i) {
    if (lanes[o + i] != lanes[o] + i) {
      *offset = 0;
      return lanes + o;
    }
  }
  return nullptr;
}

// Values that do not lie side by side (PixelShuffle of few channels).
template <class T>
FASTSR_INLINE Vector gather(const T* p, const int64_t* lanes, int count) {
  alignas(64) float all[LANES] = {};
  for (int i = 0; i < count; ++i) store_as(all + i, load_as(p + lanes[i], 1), 1);
  return load(all);
}

template <class T>
FASTSR_INLINE void scatter(T* p, const int64_t* lanes, Vector v, int count) {
  alignas(64) float all[LANES];
  store(all, v);
  for (int i = 0; i < count; ++i) store_as(p + lanes[i], load_as(all + i, 1), 1);
}

FASTSR_INLINE Vector activated(Vector y, float slope) {
  return slope == 1.f ? y : slope == 0.f ? relu(y) : where_positive(y, y, mul(y, set1(slope)));
}

FASTSR_INLINE Vector masked(Vector y, Vector mask, float slope) { return where_positive(mask, y, slope == 0.f ? set1(0.f) : mul(y, set1(slope))); }

// The epilogue of one vector of channels of a row: what it reads and writes, from column 0 on.
template <class T>
struct Finish {
  Vector bias, scale;
  T* out;
  const T *mask, *skip, *skip2;
  int count;                              // channels, fewer than LANES in the last vector
  const int64_t *out_lanes, *skip_lanes;  // null where the channels lie side by side
};

// Those of the channels from `o` on of a group of so many vectors; returns how many there are.
template <class T>
FASTSR_INLINE int epilogue_of(const RowJob& job, int64_t o, int vectors, Finish<T>* to) {
  const Epilogue& e = job.epilogue;
  int n = 0;
  for (; n < vectors && o < job.conv->cout; ++n, o += LANES) {
    const int64_t left = job.conv->cout - o;
    Finish<T>& f = to[n];
    f.count = left < LANES ? static_cast<int>(left) : LANES;
    int64_t out_offset = o, skip_offset = o;
    f.out_lanes = scattered(e.out_lanes, o, f.count, &out_offset), f.skip_lanes = scattered(e.skip_lanes, o, f.count, &skip_offset);
    f.out = static_cast<T*>(job.out) + out_offset;
    f.mask = channel<T>(e.mask, o), f.skip = channel<T>(e.skip, skip_offset), f.skip2 = channel<T>(e.skip2, o);
    f.bias = load(job.conv->bias + o);
    f.scale = e.gate ? mul(set1(e.scale), load(e.gate + o)) : set1(e.scale);
  }
  return n;
}

enum Reads { kMask = 1, kSkip = 2, kSkip2 = 4 };

// A whole vector whose channels lie side by side, for `pixels` pixels from `column` on; what it reads is known, so that no pixel branches.
template <class T, int reads>
static void finish_vector(const Finish<T>& f, const RowJob& job, const float* sum, int64_t stride, int64_t column, int pixels) {
  const Epilogue& e = job.epilogue;
  const float slope = e.slope;
  const int64_t out_pixel = job.out_pixel, mask_pixel = e.mask_pixel, skip_pixel = e.skip_pixel, skip2_pixel = e.skip2_pixel;
  const Vector bias = f.bias, scale = f.scale, scale2 = set1(e.scale2);
  T* out = f.out + column * out_pixel;
  const T* mask = reads & kMask ? f.mask + column * mask_pixel : nullptr;
  const T* skip = reads & kSkip ? f.skip + column * skip_pixel : nullptr;
  const T* skip2 = reads & kSkip2 ? f.skip2 + column * skip2_pixel : nullptr;
  for (int i = 0; i < pixels; ++i) {
    Vector y = add(load(sum), bias);
    y = reads & kMask ? masked(y, load_as(mask, LANES), slope) : activated(y, slope);
    y = mul(y, scale);
    if (reads & kSkip) y = add(y, load_as(skip, LANES));
    y = reads & kSkip2 ? fma(y, scale2, load_as(skip2, LANES)) : mul(y, scale2);
    store_as(out, y, LANES);
    sum += stride, out += out_pixel;
    if (reads & kMask) mask += mask_pixel;
    if (reads & kSkip) skip += skip_pixel;
    if (reads & kSkip2) skip2 += skip2_pixel;
  }
}

// The same for fewer channels than a vector has, or such as do not lie side by side.
template <class T>
static void finish_part(const Finish<T>& f, const RowJob& job, const float* sum, int64_t stride, int64_t column, int pixels) {
  const Epilogue& e = job.epilogue;
  for (int64_t x = column; x < column + pixels; ++x, sum += stride) {
    Vector y = add(load(sum), f.bias);
    y = f.mask ? masked(y, load_as(f.mask + x * e.mask_pixel, f.count), e.slope) : activated(y, e.slope);
    y = mul(y, f.scale);
    if (f.skip) {
      const T* p = f.skip + x * e.skip_pixel;
      y = add(y, f.skip_lanes ? gather(p, f.skip_lanes, f.count) : load_as(p, f.count));
    }
    y = f.skip2 ? fma(y, set1(e.scale2), load_as(f.skip2 + x * e.skip2_pixel, f.count)) : mul(y, set1(e.scale2));
    T* out = f.out + x * job.out_pixel;
    if (f.out_lanes) {
      scatter(out, f.out_lanes, y, f.count);
    } else {
      store_as(out, y, f.count);
    }
  }
}

template <class T>
FASTSR_INLINE void finish(const Finish<T>& f, const RowJob& job, const float* sum, int64_t stride, int64_t column, int pixels) {
  static constexpr void (*kVector[])(const Finish<T>&, const RowJob&, const float*, int64_t, int64_t, int) = {
      &finish_vector<T, 0>, &finish_vector<T, 1>, &finish_vector<T, 2>, &finish_vector<T, 3>,
      &finish_vector<T, 4>, &finish_vector<T, 5>, &finish_vector<T, 6>, &finish_vector<T, 7>};
  const bool whole = f.count == LANES && !f.out_lanes && !f.skip_lanes;
  const int reads = (f.mask ? kMask : 0) | (f.skip ? kSkip : 0) | (f.skip2 ? kSkip2 : 0);
  (whole ? kVector[reads] : &finish_part<T>)(f, job, sum, stride, column, pixels);
}

template <class Op, int P, int V>
constexpr auto tile_function() {
  if constexpr (V == 0) {
    return &tile_abreast<Op, P>;
  } else {
    return &tile<Op, P, V>;
  }
}

// The tile function for a number of pixels; no vectors (of outputs) stands for few outputs abreast.
template <class Op, int V>
FASTSR_INLINE void run_tile(int pixels, const TileInput& in, float* sums) {
#define FASTSR_TILE(p) tile_function<Op, p <= PIXELS ? p : PIXELS, V>()
  static constexpr void (*kTiles[])(const TileInput&, float*) = {
      FASTSR_TILE(1), FASTSR_TILE(2), FASTSR_TILE(3), FASTSR_TILE(4),  FASTSR_TILE(5),  FASTSR_TILE(6),
      FASTSR_TILE(7), FASTSR_TILE(8), FASTSR_TILE(9), FASTSR_TILE(10), FASTSR_TILE(11), FASTSR_TILE(12)};
#undef FASTSR_TILE
  kTiles[pixels - 1](in, sums);
}

template <class T>
FASTSR_INLINE void add_fetch(TileInput& in, const T* row, int64_t pixel, int64_t column, int64_t channels, bool write) {
  constexpr int64_t kSize = sizeof(T);
  if (row) in.fetches[in.fetch_count++] = {reinterpret_cast<const char*>(row + column * pixel), pixel * kSize, channels * kSize, write};
}

// What the epilogue will read and write of a group's `count` vectors, if their channels lie side by side.
template <class T>
FASTSR_INLINE void add_epilogue_fetches(TileInput& in, const RowJob& job, const Finish<T>* f, int count, int64_t column) {
  const Epilogue& e = job.epilogue;
  const int64_t channels = count * LANES;
  if (!job.cold) return;
  const bool whole = !f->out_lanes && f[count - 1].out - f->out == channels - LANES;
  const bool whole_skip = !f->skip_lanes && f[count - 1].skip - f->skip == channels - LANES;
  if (whole) add_fetch<T>(in, f->out, job.out_pixel, column, channels, true);
  if (whole_skip) add_fetch<T>(in, f->skip, e.skip_pixel, column, channels, false);
  add_fetch<T>(in, f->skip2, e.skip2_pixel, column, channels, false);
  add_fetch<T>(in, f->mask, e.mask_pixel, column, channels, false);
}

template <class Op, class T>
FASTSR_INLINE void row(const RowJob& job) {
  const int64_t count = job.end - job.begin;
  if (count <= 0) return;
  const int64_t tiles = (count + PIXELS - 1) / PIXELS, wide = count % tiles;
  const int narrow = static_cast<int>(count / tiles);
  alignas(64) float sums[PIXELS * GROUP];
  Finish<T> finishes[VECTORS];
  TileInput in;
  in.pixel = job.x_pixel * (4 / Op::kUnit);
  in.steps = job.conv->cin / Op::kUnit;
  in.zeros = static_cast<const char*>(job.conv->zeros);
  in.outputs = job.conv->cout;
  for (int64_t o = 0; o < job.conv->cout; o += GROUP) {
    const int vectors = job.conv->cout - o > LANES ? VECTORS : 1;  // the last group may be narrower
    const int finish_count = epilogue_of(job, o, vectors, finishes);
    in.weights = job.conv->weights + o * 9 * in.steps * 4;
    int64_t column = job.begin;
    for (int64_t t = 0; t < tiles; ++t) {
      const int pixels = narrow + (t < wide);
      for (int dy = 0; dy < 3; ++dy) in.row[dy] = job.x[dy] ? static_cast<const char*>(job.x[dy]) + column * in.pixel : nullptr;
      in.fetch_count = 0;
      if (o == 0) add_fetch<T>(in, static_cast<const T*>(job.ahead), job.ahead_pixel, column, job.conv->cin, false);
      add_epilogue_fetches<T>(in, job, finishes, finish_count, column);
      in.left = column == 0, in.right = column + pixels == job.width;
      if (job.conv->abreast) {
        run_tile<Op, 0>(pixels, in, sums);
      } else {
        vectors == 1 ? run_tile<Op, 1>(pixels, in, sums) : run_tile<Op, VECTORS>(pixels, in, sums);
      }
      for (int v = 0; v < finish_count; ++v) finish(finishes[v], job, sums + v * LANES, vectors * LANES, column, pixels);
      column += pixels;
    }
  }
}

template <class Op, class T>
static void rows(const RowJob* jobs, int64_t count) {
  for (int64_t i = 0; i < count; ++i) row<Op, T>(jobs[i]);
}

template <class T>
static void read(const void* from, void* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    const int lanes = count - i < LANES ? static_cast<int>(count - i) : LANES;
    store_as(static_cast<float*>(to) + i, load_as(static_cast<const T*>(from) + i, lanes), lanes);
  }
}
