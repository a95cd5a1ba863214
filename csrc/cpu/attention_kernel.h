// Channel attention's passes over pictures, and its small matrices: the text that every instruction set compiles for itself.
//
//     pixels   | c0 c1 .. c63 | c0 c1 .. c63 | c0 ..       A group is one pixel, or as many as fill whole vectors: lane k of
//     groups   [ v0 v1 v2 v3 | v4 v5 v6 v7 ]  [ v0 ..      vector v always belongs to the same channel, whatever C is. The gate
//                                                          is laid out once in that pattern; sums are kept in it and folded.
//
// Lives in   registers: 4 vectors of sums, over 16 groups     L1: the pattern (16 KB at most)     memory: the pictures, read once a pass
// Moves      forward 4 and backward 5 times a picture's bytes (x twice, residual, out; g twice, x, dx)
// Limit      memory bandwidth: an operation or two per value

constexpr int64_t kGroups = 16;  // summed in registers before they go to the strip's sums: a second level, for the rounding error

// Asks for what a run reaches a page later, where the hardware's own prefetching stops. Measured, bfloat16 4x64x256x256, inputs in
// DRAM: 5.4 ms without, 4.8 with; float32, which is at the copy's bandwidth, does not change. Around the L2 cache (NTA): half as fast.
FASTSR_INLINE void ask_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 4096, 0, 2); }

// Adds `count` values (LANES of them where kWhole) in each of V vectors of some groups to `sums`.
template <class T, bool kProduct, int V, bool kWhole>
FASTSR_INLINE void sum_vectors(const T* x, int64_t x_unit, const T* g, int64_t g_unit, int64_t groups, int count, float* sums) {
  if (kWhole) count = LANES;
  Vector sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] = load(sums + v * LANES);
  Vector part[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) part[v] = set1(0.f);
  for (int64_t u = 0; u < groups; ++u, x += x_unit, g += g_unit) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      ask_ahead(x + v * LANES);
      if (kProduct) ask_ahead(g + v * LANES);
      const Vector a = load_as(x + v * LANES, count);
      part[v] = kProduct ? fma(a, load_as(g + v * LANES, count), part[v]) : add(a, part[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(sums + v * LANES, add(sum[v], part[v]));
}

// All vectors of some groups; the last one holds `last` values.
template <class T, bool kProduct>
FASTSR_INLINE void sum_groups(const T* x, int64_t x_unit, const T* g, int64_t g_unit, int64_t groups, int64_t vectors, int64_t last,
                              float* sums) {
  const int64_t whole = last == LANES ? vectors : vectors - 1;
  int64_t v = 0;
  for (; v + 4 <= whole; v += 4) sum_vectors<T, kProduct, 4, true>(x + v * LANES, x_unit, g + v * LANES, g_unit, groups, LANES, sums + v * LANES);
  for (; v < whole; ++v) sum_vectors<T, kProduct, 1, true>(x + v * LANES, x_unit, g + v * LANES, g_unit, groups, LANES, sums + v * LANES);
  if (v < vectors) sum_vectors<T, kProduct, 1, false>(x + v * LANES, x_unit, g + v * LANES, g_unit, groups, static_cast<int>(last), sums + v * LANES);
}

template <class T, bool kProduct>
FASTSR_INLINE void sum_run(const Run& run, const T* x, int64_t x_unit, const T* g, int64_t g_unit, float* sums) {
  for (int64_t u = 0; u < run.units; u += kGroups) {
    const int64_t groups = run.units - u < kGroups ? run.units - u : kGroups;
    sum_groups<T, kProduct>(x + u * x_unit, x_unit, g + u * g_unit, g_unit, groups, run.vectors, run.last, sums);
  }
  if (run.tail == 0) return;
  const int64_t vectors = (run.tail + LANES - 1) / LANES;
  sum_groups<T, kProduct>(x + run.units * x_unit, 0, g + run.units * g_unit, 0, 1, vectors, run.tail - (vectors - 1) * LANES, sums);
}

template <class T>
static void sum(const Run& run, const void* x, int64_t x_unit, const void* g, int64_t g_unit, float* sums) {
  const T *a = static_cast<const T*>(x), *b = static_cast<const T*>(g);
  b ? sum_run<T, true>(run, a, x_unit, b, g_unit, sums) : sum_run<T, false>(run, a, x_unit, a, x_unit, sums);
}

enum class Plus { nothing, residual, shift };

template <class T, Plus kPlus, bool kStream>
FASTSR_INLINE void scale_vector(const ScaleJob& job, const T* x, const T* residual, T* out, int64_t v, int count) {
  ask_ahead(x + v);
  if (kPlus == Plus::residual) ask_ahead(residual + v);
  Vector y = load_as(x + v, count);
  const Vector factor = load(job.factors + v);
  if (kPlus == Plus::nothing) y = mul(factor, y);
  if (kPlus == Plus::residual) y = fma(factor, y, load_as(residual + v, count));
  if (kPlus == Plus::shift) y = fma(factor, y, load(job.shifts + v));
  kStream ? stream_as(out + v, y) : store_as(out + v, y, count);
}

template <class T, Plus kPlus, bool kStream>
static void scale_run(const ScaleJob& job) {
  const T *x = static_cast<const T*>(job.x), *residual = static_cast<const T*>(job.residual);
  T* out = static_cast<T*>(job.out);
  const Run& run = job.run;
  const int64_t whole = (run.vectors - (run.last != LANES)) * LANES;
  for (int64_t u = 0; u < run.units; ++u) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < whole; v += LANES) scale_vector<T, kPlus, kStream>(job, x, residual, out, v, LANES);
    if (run.last != LANES) scale_vector<T, kPlus, false>(job, x, residual, out, whole, static_cast<int>(run.last));
    x += job.x_unit, out += job.out_unit;
    if (kPlus == Plus::residual) residual += job.residual_unit;
  }
  int64_t v = 0;
  for (; v + LANES <= run.tail; v += LANES) scale_vector<T, kPlus, kStream>(job, x, residual, out, v, LANES);
  if (v < run.tail) scale_vector<T, kPlus, false>(job, x, residual, out, v, static_cast<int>(run.tail - v));
  if (kStream) stream_end();
}

template <class T, Plus kPlus>
FASTSR_INLINE void scale_any(const ScaleJob& job) { job.stream ? scale_run<T, kPlus, true>(job) : scale_run<T, kPlus, false>(job); }

template <class T>
static void scale(const ScaleJob& job) {
  if (job.residual) return scale_any<T, Plus::residual>(job);
  job.shifts ? scale_any<T, Plus::shift>(job) : scale_any<T, Plus::nothing>(job);
}

FASTSR_INLINE int up_to_lanes(int64_t left) { return static_cast<int>(left < LANES ? left : LANES); }

FASTSR_INLINE float across(Vector v) {
  float lanes[LANES];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class T>
FASTSR_INLINE float widened(const T* p) {
  float lanes[LANES];
  store(lanes, load_as(p, 1));
  return lanes[0];
}

template <class T>
static void multiply(const void* weights, const void* bias, const float* x, int64_t rows, int64_t columns, float* y) {
  const T *w = static_cast<const T*>(weights), *b = static_cast<const T*>(bias);
  for (int64_t o = 0; o < rows; ++o, w += columns) {
    Vector sum[2] = {set1(0.f), set1(0.f)};
    int64_t i = 0;
    for (; i + 2 * LANES <= columns; i += 2 * LANES) {
      sum[0] = fma(load_as(w + i, LANES), load(x + i), sum[0]);
      sum[1] = fma(load_as(w + i + LANES, LANES), load(x + i + LANES), sum[1]);
    }
    for (; i < columns; i += LANES) {
      const int count = up_to_lanes(columns - i);
      sum[0] = fma(load_as(w + i, count), load_as(x + i, count), sum[0]);
    }
    y[o] = across(add(sum[0], sum[1])) + (b ? widened(b + o) : 0.f);
  }
}

template <class T>
static void multiply_transposed(const void* weights, const float* x, int64_t rows, int64_t columns, float* y) {
  for (int64_t i = 0; i < columns; i += LANES) {
    const int count = up_to_lanes(columns - i);
    const T* w = static_cast<const T*>(weights) + i;
    Vector sum[4] = {set1(0.f), set1(0.f), set1(0.f), set1(0.f)};  // chains: for the latency and the rounding error
    int64_t o = 0;
    for (; o + 4 <= rows; o += 4, w += 4 * columns) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] = fma(load_as(w + k * columns, count), set1(x[o + k]), sum[k]);
    }
    for (; o < rows; ++o, w += columns) sum[0] = fma(load_as(w, count), set1(x[o]), sum[0]);
    store_as(y + i, add(add(sum[0], sum[1]), add(sum[2], sum[3])), count);
  }
}

template <class T>
static void outer(const float* a, const float* b, int64_t batch, int64_t rows, int64_t columns, void* weights, void* bias) {
  T *w = static_cast<T*>(weights), *biases = static_cast<T*>(bias);
  for (int64_t o = 0; o < rows; ++o, w += columns) {
    for (int64_t i = 0; i < columns; i += LANES) {
      const int count = up_to_lanes(columns - i);
      Vector sum = set1(0.f);
      for (int64_t n = 0; n < batch; ++n) sum = fma(set1(a[n * rows + o]), load_as(b + n * columns + i, count), sum);
      store_as(w + i, sum, count);
    }
    if (!biases) continue;
    float sum = 0.f;
    for (int64_t n = 0; n < batch; ++n) sum += a[n * rows + o];
    store_as(biases + o, set1(sum), 1);
  }
}
