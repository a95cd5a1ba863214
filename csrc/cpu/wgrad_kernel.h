// The weight gradient of a 3x3 convolution: the text that every instruction set compiles for itself.
//
//                  input channels of x[p + tap]       A task owns up to 3 blocks of BLOCK input channels (32 on AVX-512) x up to
//                 +-------------+-------------+      64 outputs x its taps, over all pixels of all images. A register tile is
//    g[p], one    |  16 lanes   |  16 lanes   |      OUTPUTS x 2 vectors of one tap: per pixel, 2 loads of x, OUTPUTS
//    output       |             |             |      broadcasts of g and 2 * OUTPUTS multiply-adds.
//    channel,     +-------------+-------------+
//    broadcast    |    up to OUTPUTS rows     |      Pixels come in segments of about 160: part of one row, or some rows.
//                 +-------------+-------------+
//
// Lives in   registers: the tile, over a segment    L1: x of one row of taps (20 KB), g of one tile (9 KB), of a segment
//            L2: the sums of the task, 36 KB per 32 x 32 channels, and the segment's rows
// Copies     Rows are read once per task, as float32 or as pairs of bfloat16, into dense scratch: any dtype, stride and number of
//            channels comes to the same loop, and no pixel stride of 1024 bytes makes its lines evict each other.
// Borders    The first or last pixel of a tap that looks over the row's end is left out (pairs: multiplied by zeros).
// Order      Over a segment in registers, then over segments in memory: fixed by the picture's shape, not by the task's share
//            of outputs and taps. Two levels keep the rounding error below that of one long sum.
// Limit      The FMA units: 9 * C * O multiply-adds per pixel; per block, 4 to 5 loads and stores of copies for 288 vector multiply-adds
//            at O = 32, and 13 loads for 22 of them in the tile.
//
// predicted / measured, AVX-512, five convolutions 64->32 .. 160->32, 192->64 of a dense block, one thread, of a 210 GFLOP/s FMA roof
// (a busy machine; oneDNN channels-last beside it):
//   float32  16x48x48     85% / 69% (oneDNN 73%)      1x128x128   85% / 72% (oneDNN 60%)
//   bfloat16 as float32   85% / 77%, the same text: half the bytes to copy. What float32 lacks is memory, not arithmetic.

// What a step takes: a pixel in float32, or two in bfloat16. Both are four bytes per channel.
struct Floats {
  static constexpr int kUnit = 1;
  using Operand = Vector;
  FASTSR_INLINE Operand input(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  FASTSR_INLINE Operand broadcast(const char* p) { return set1(*reinterpret_cast<const float*>(p)); }
  FASTSR_INLINE Vector multiply_add(Operand g, Operand x, Vector sum) { return fma(g, x, sum); }
};

constexpr int VECTORS = 2, BLOCK = VECTORS * LANES;
constexpr int OUTPUTS = LANES == 16 ? 14 : LANES == 8 ? 6 : 4;
constexpr int64_t kMaxOutputs = 64, kMaxChannels = 3 * BLOCK, kPixels = 160, kStepBytes = 4;

FASTSR_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
FASTSR_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
FASTSR_INLINE int64_t in_parts(int64_t a, int64_t most) { return a ? (a + (a + most - 1) / most - 1) / ((a + most - 1) / most) : 1; }

// How a task cuts the picture into segments, and its scratch.
struct Plan {
  int64_t columns, rows;    // of a segment
  int64_t ring;             // rows of x in scratch
  int64_t blocks;           // of input channels
  int64_t groups;           // of output channels
  int64_t x_row, steps;     // bytes of a row of x in scratch, steps of a row of g
  int64_t x_block;          // bytes of a block's rows of x
  int64_t sums_tap;         // floats of the sums per tap
  int64_t x_at, g_at, bias_at, bytes;
};

template <class Op>
static Plan plan_task(const WeightGradientTask& task) {
  Plan p;
  p.columns = in_parts(task.width, kPixels);
  p.rows = in_parts(task.height, at_least(1, kPixels / p.columns));
  p.ring = p.rows + 2;
  p.blocks = (task.channels + BLOCK - 1) / BLOCK;
  p.groups = (task.outputs + OUTPUTS - 1) / OUTPUTS;
  p.steps = (p.columns + Op::kUnit - 1) / Op::kUnit;
  p.x_row = (Op::kUnit == 1 ? p.columns + 2 : 2 * p.steps + 1) * BLOCK * kStepBytes;
  p.sums_tap = task.outputs * BLOCK;
  p.x_block = p.ring * p.x_row;
  p.x_at = p.blocks * 9 * p.sums_tap * 4;
  p.g_at = p.x_at + p.blocks * p.x_block;
  p.bias_at = p.g_at + p.rows * p.steps * task.outputs * kStepBytes + LANES * 4;  // the last vector stored reaches beyond its group
  p.bytes = p.bias_at + 2 * task.outputs * 4;
  return p;
}

// The first output channel of a group.
FASTSR_INLINE int64_t group_begin(const WeightGradientTask& task, const Plan& plan, int64_t group) {
  return group * (task.outputs / plan.groups) + at_most(group, task.outputs % plan.groups);
}

// Rows of a segment, for one tap.
struct Segment {
  const char *x, *g;   // x: of slot 0
  int64_t x_row, g_row, g_step;
  int64_t slot, ring;  // of the first row of x
  int64_t rows, steps;
};

template <class Op, int O, int V>
static __attribute__((noinline)) void tile(const Segment& in, float* sums) {
  constexpr int64_t kStep = V * LANES * kStepBytes;
  Vector sum[O][V];
#pragma GCC unroll 16
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[o][v] = set1(0.f);
  }
  const int64_t g_step = in.g_step;
  const char* g_row = in.g;
  int64_t slot = in.slot;
  for (int64_t row = 0; row < in.rows; ++row, g_row += in.g_row) {
    const char *x = in.x + slot * in.x_row, *g = g_row;
    slot = slot + 1 == in.ring ? 0 : slot + 1;
    for (int64_t k = in.steps; k > 0; --k, x += kStep, g += g_step) {
      typename Op::Operand inputs[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) inputs[v] = Op::input(x + v * LANES * kStepBytes);
#pragma GCC unroll 16
      for (int o = 0; o < O; ++o) {
        const typename Op::Operand b = Op::broadcast(g + o * kStepBytes);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[o][v] = Op::multiply_add(b, inputs[v], sum[o][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = sums + (o * V + v) * LANES;
      store(to, add(load(to), sum[o][v]));
    }
  }
}

template <class Op, int V>
FASTSR_INLINE void run_tile(int64_t outputs, const Segment& in, float* sums) {
#define FASTSR_TILE(o) &tile<Op, o <= OUTPUTS ? o : OUTPUTS, V>
  static constexpr void (*kTiles[])(const Segment&, float*) = {
      FASTSR_TILE(1), FASTSR_TILE(2), FASTSR_TILE(3),  FASTSR_TILE(4),  FASTSR_TILE(5),  FASTSR_TILE(6),  FASTSR_TILE(7),
      FASTSR_TILE(8), FASTSR_TILE(9), FASTSR_TILE(10), FASTSR_TILE(11), FASTSR_TILE(12), FASTSR_TILE(13), FASTSR_TILE(14)};
#undef FASTSR_TILE
  kTiles[outputs - 1](in, sums);
}

FASTSR_INLINE int lanes_left(int64_t channels, int64_t from) { return static_cast<int>(at_most(LANES, channels - from)); }

// Copies `count` channels of some pixels, 8 pixels at a time: a load behind a store to an address equal in its last 12 bits would
// wait for it, and the strides make many equal. Returns the sum of the pixels.
template <class T>
FASTSR_INLINE Vector copy_pixels(const T* from, int64_t stride, int64_t pixels, int count, float* to, int64_t to_stride) {
  Vector sum = set1(0.f);
  for (; pixels >= 8; pixels -= 8, from += 8 * stride, to += 8 * to_stride) {
    Vector v[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) v[i] = load_as(from + i * stride, count);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) store(to + i * to_stride, v[i]);
    sum = add(sum, add(add(add(v[0], v[1]), add(v[2], v[3])), add(add(v[4], v[5]), add(v[6], v[7]))));
  }
  for (; pixels > 0; --pixels, from += stride, to += to_stride) {
    const Vector v = load_as(from, count);
    store(to, v);
    sum = add(sum, v);
  }
  return sum;
}

// Copies columns [begin, end) of a row of x, with a neighbour on either side: `to` holds columns from begin - 1 on.
template <class T>
FASTSR_INLINE void read_input(Floats, const T* from, int64_t stride, int64_t width, int64_t channels, int64_t begin, int64_t end,
                              char* to) {
  const int64_t vectors = channels > LANES ? 2 : 1, left = at_least(begin - 1, 0), right = at_most(end + 1, width);
  for (int64_t v = 0; v < vectors; ++v) {
    float* out = reinterpret_cast<float*>(to) + ((left - begin + 1) * vectors + v) * LANES;
    copy_pixels(from + left * stride + v * LANES, stride, right - left, lanes_left(channels, v * LANES), out, vectors * LANES);
  }
}

// Adds to `count` sums, and what rounding took from them to `lost`: a bias is summed over all pixels, without a second level.
FASTSR_INLINE void add_exactly(float* sums, float* lost, Vector v, int count) {
  const Vector before = load_as(sums, count), after = add(before, v), minus = set1(-1.f);
  const Vector added = add(after, mul(before, minus)), kept = add(after, mul(added, minus));
  const Vector error = add(add(before, mul(kept, minus)), add(v, mul(added, minus)));
  store_as(sums, after, count);
  store_as(lost, add(load_as(lost, count), error), count);
}

// Copies a row of `count` channels of g side by side, and adds it to the bias's gradient.
template <class T>
FASTSR_INLINE void read_gradient(Floats, const T* from, int64_t stride, int64_t pixels, int count, char* to, float* bias, float* lost) {
  const Vector sum = copy_pixels(from, stride, pixels, count, reinterpret_cast<float*>(to), count);
  add_exactly(bias, lost, sum, count);
}

// Sets the steps of tap column dx: where x and g begin in their rows, and how many there are.
FASTSR_INLINE void set_steps(Floats, Segment& s, int64_t dx, int64_t begin, int64_t end, int64_t width, int64_t x_step) {
  const int64_t skip = dx == 0 && begin == 0;
  s.x += (dx + skip) * x_step;
  s.g += skip * s.g_step;
  s.steps = end - begin - skip - (dx == 2 && end == width);
}

// A segment's place in the pictures: columns [begin, end) of rows [top, bottom) of image n.
struct Place {
  int64_t begin, n, top, end, bottom;
};

FASTSR_INLINE void set_place(const WeightGradientTask& task, const Plan& plan, Place* p) {
  p->end = at_most(p->begin + plan.columns, task.width);
  p->bottom = at_most(p->top + plan.rows, task.height);
}

// The place after `p`: down the image, then the next image, then the next columns.
FASTSR_INLINE Place following(const WeightGradientTask& task, const Plan& plan, Place p) {
  p.top += plan.rows;
  if (p.top >= task.height) p.top = 0, ++p.n;
  if (p.n >= task.batch) p.n = 0, p.begin += plan.columns;
  set_place(task, plan, &p);
  return p;
}

template <class Op>
static void add_segment(const WeightGradientTask& task, const Plan& plan, const Place& at) {
  char* scratch = static_cast<char*>(task.scratch);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int vectors = task.channels - block * BLOCK > LANES ? 2 : 1;
    for (int64_t dy = task.first_tap; dy < task.last_tap; ++dy) {
      const int64_t first = at_least(at.top, 1 - dy), last = at_most(at.bottom, task.height + 1 - dy);
      for (int64_t group = 0; group < plan.groups; ++group) {
        const int64_t o = group_begin(task, plan, group), outputs = group_begin(task, plan, group + 1) - o;
        const int64_t g_step = outputs * kStepBytes, g_row = plan.steps * g_step;
        const char* g = scratch + plan.g_at + plan.rows * plan.steps * o * kStepBytes + (first - at.top) * g_row;
        for (int64_t dx = 0; dx < 3 && first < last; ++dx) {
          Segment s{scratch + plan.x_at + block * plan.x_block, g, plan.x_row, g_row, g_step,
                    (first + dy - 1) % plan.ring, plan.ring, last - first, 0};
          set_steps(Op(), s, dx, at.begin, at.end, task.width, vectors * LANES * kStepBytes);
          float* sums = reinterpret_cast<float*>(scratch) + (block * 9 + dy * 3 + dx) * plan.sums_tap + o * vectors * LANES;
          vectors == 1 ? run_tile<Op, 1>(outputs, s, sums) : run_tile<Op, VECTORS>(outputs, s, sums);
        }
      }
    }
  }
}

// Writes the scaled sums, [block][tap][output][channel] -> [output][channel][tap]; a block of few channels is `narrow` wide.
template <class T>
static void write_sums(const WeightGradientTask& task, const float* all_sums, int64_t tap, int64_t narrow, const float* bias) {
  const Vector scale = set1(task.scale);
  const int64_t first = task.first_tap * 3, taps = task.last_tap * 3 - first;
  alignas(64) float turned[BLOCK * 9 + LANES] = {};
  for (int64_t block = 0; block * BLOCK < task.channels; ++block) {
    const int64_t channels = at_most(BLOCK, task.channels - block * BLOCK), width = channels > LANES ? BLOCK : narrow;
    // With all taps the channels' values lie end to end, else each channel is a run of its own.
    const int64_t runs = taps == 9 ? 1 : channels, length = channels * taps / runs;
    for (int64_t o = 0; o < task.outputs; ++o) {
      const float* sums = all_sums + (block * 9 + first) * tap + o * width;
      for (int64_t t = 0; t < taps; ++t, sums += tap) {
        for (int64_t c = 0; c < channels; ++c) turned[c * taps + t] = sums[c];
      }
      T* to = static_cast<T*>(task.dweight) + o * task.output_stride + block * BLOCK * 9 + first;
      for (int64_t run = 0; run < runs; ++run, to += 9) {
        for (int64_t i = 0; i < length; i += LANES) store_as(to + i, mul(load(turned + run * length + i), scale), lanes_left(length, i));
      }
    }
  }
  if (!task.dbias) return;
  for (int64_t o = 0; o < task.outputs; o += LANES) {
    const int count = lanes_left(task.outputs, o);
    store_as(static_cast<T*>(task.dbias) + o, mul(add(load_as(bias + o, count), load_as(bias + task.outputs + o, count)), scale), count);
  }
}

template <class T>
static void write_results(const WeightGradientTask& task, const float* sums, int64_t tap, int64_t narrow, const float* bias) {
  task.wide ? write_sums<float>(task, sums, tap, narrow, bias) : write_sums<T>(task, sums, tap, narrow, bias);
}

template <class Op, class T>
static void run_task(const WeightGradientTask& task) {
  const Plan plan = plan_task<Op>(task);
  char* scratch = static_cast<char*>(task.scratch);
  float* bias = reinterpret_cast<float*>(scratch + plan.bias_at);
  __builtin_memset(scratch, 0, plan.x_at);
  __builtin_memset(bias, 0, plan.bytes - plan.bias_at);
  Place at{0, 0, 0, 0, 0};
  set_place(task, plan, &at);
  int64_t loaded = 0;  // rows of x of this image and these columns
  while (task.batch > 0 && task.height > 0 && at.begin < task.width) {
    const T *x = static_cast<const T*>(task.x.data) + at.n * task.x.n, *g = static_cast<const T*>(task.g.data) + at.n * task.g.n;
    if (at.top == 0) loaded = 0;
    for (; loaded < at_most(at.bottom + 1, task.height); ++loaded) {
      char* to = scratch + plan.x_at + loaded % plan.ring * plan.x_row;
      for (int64_t b = 0; b < plan.blocks; ++b, to += plan.x_block) {
        read_input(Op(), x + loaded * task.x.h + b * BLOCK, task.x.w, task.width, task.channels - b * BLOCK, at.begin, at.end, to);
      }
    }
    for (int64_t group = 0; group < plan.groups; ++group) {
      const int64_t o = group_begin(task, plan, group), count = group_begin(task, plan, group + 1) - o;
      char* to = scratch + plan.g_at + plan.rows * plan.steps * o * kStepBytes;
      for (int64_t y = at.top; y < at.bottom; ++y, to += plan.steps * count * kStepBytes) {
        const T* from = g + y * task.g.h + at.begin * task.g.w + o;
        read_gradient(Op(), from, task.g.w, at.end - at.begin, static_cast<int>(count), to, bias + o, bias + task.outputs + o);
      }
    }
    add_segment<Op>(task, plan, at);
    at = following(task, plan, at);
  }
  write_results<T>(task, reinterpret_cast<const float*>(scratch), plan.sums_tap, LANES, bias);
}

template <class Op>
static int64_t scratch_bytes(const WeightGradientTask& task) { return plan_task<Op>(task).bytes; }
