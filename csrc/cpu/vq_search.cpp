// Certified nearest-code search: float32 scores with a bound on their error, float64 distances where the bound cannot decide.
//
// With a shift m (the codebook's mean, or zero) and a power of two f:
//
//     X = f (x - m)    E_k = f (e_k - m)    s_k = |E_k|^2 / 2 - X . E_k       (f^2 |x - e_k|^2 = |X|^2 + 2 s_k)
//
// The kernels compute s'_k from rounded X', E'_k. With u = 2^-24, M = max |E'_k|, H = M^2 / 2, S = H + |X'| M and r = 1 rounding per
// product and sum (2 without fused multiply-adds):
//
//     |s'_k - s_k| <=  c S,  c = g / (1 - g),  g = (r (D + 1) + 16) u     rounded products and sums, and the rounding of X', E' and h
//                    + (D + 4) 2^-148 (1 + M + |X'|)                       what underflows
//     B            =   both + (D + 8) 2^-53 (|X'|^2 / 2 + S)               and the rounding of the float64 distances themselves
//
// A row whose second score exceeds its first by more than 2 B is decided: no other code's float64 distance can be as small. Else the
// codes with s'_k <= first + 2 B are collected by running the row through the products once more, and compared in float64. Rows with
// more than Candidates::kMost of them, rows whose scores could overflow and everything beside a codebook that is not finite are
// compared in float64 with all codes.
//
// Rows go to the threads in blocks, taken from one queue: what a block costs depends on its values. No index depends on that.
#include "cpu/vq_search.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/conv_driver.h"
#include "cpu/isa.h"

namespace fastsr::cpu {
namespace {

constexpr int64_t kCodeBytes = 256 << 10;   // of packed codes that a block of rows meets at a time: they stay in L2
constexpr int64_t kBlockBytes = 1 << 20;    // of a block of packed rows and their state, in L2 too
constexpr int64_t kKeptBytes = 64 << 20;    // of packed codes, from one call to the next
constexpr int64_t kMostRows = 1024;         // of a block
constexpr int64_t kMostTile = 32;           // rows or codes of a register tile
constexpr int64_t kMostCodes = 1 << 24;     // a lane keeps an index as a float
constexpr int64_t kColumns = 64, kNorms = 256;  // of a task
constexpr int64_t kUnknown = -1;

const VqKernel& choose_vq_kernel() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return avx512::vq;
  if (isa() >= Isa::avx2) return avx2::vq;
#endif
  return portable::vq;
}

// Rounding to nearest and gradual underflow, whatever the caller has set for this thread: the bound counts on both.
class DefaultRounding {
 public:
  DefaultRounding() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultRounding() { std::fesetenv(&before_); }
  DefaultRounding(const DefaultRounding&) = delete;

 private:
  std::fenv_t before_;
};

template <class Task>
void on_threads(int64_t tasks, const Task& task) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    DefaultRounding rounding;
    for (int64_t i = next++; i < tasks; i = next++) task(i);
  });
}

int64_t parts(int64_t size, int64_t most) { return (size + most - 1) / most; }

const char* element(const void* data, int64_t i, Element type) {
  return static_cast<const char*>(data) + i * (type == Element::f32 ? 4 : 2);
}

float inverse(double norm) { return static_cast<float>(1 / (norm != 0 ? norm : 1)); }

// One head's codes, packed for the kernel.
struct Codebook {
  const void* codes;          // as given
  std::vector<float> mean;    // m
  std::vector<double> norms;  // of each code, with the cosine metric
  float scale;                // f
  const float *values, *half;
  int64_t tiles;
  double largest;             // M
  bool certified;             // false: compare all rows with all codes
};

// What a thread works in.
struct Scratch {
  Buffer memory;
  float *x, *squares, *state, *first, *second;  // of a block of rows
  double* row;                                  // one, widened
  float again[kMostTile];                       // squares of a group that is packed once more
  std::vector<int64_t> index;
};

class Search {
 public:
  explicit Search(const VqProblem& problem) : p_(problem), kernel_(choose_vq_kernel()), type_(static_cast<int>(problem.type)) {
    // Few rows are not worth a packed codebook.
    packed_ = p_.rows() >= kernel_.rows && p_.codes < kMostCodes;
    book_.tiles = parts(p_.codes, kernel_.codes);
    const int64_t bytes = packed_ ? book_.tiles * kernel_.codes * (p_.channels + 1) * 4 : 0;
    thread_local Buffer kept;
    book_.values = static_cast<float*>((bytes > kKeptBytes ? large_ : kept).reserve(std::max<int64_t>(bytes, 64)));
    book_.half = book_.values + book_.tiles * kernel_.codes * p_.channels;
    const int64_t group_bytes = 4 * kernel_.rows * (p_.channels + kernel_.state), threads = torch::stable::get_num_threads();
    groups_ = std::clamp<int64_t>(kBlockBytes / group_bytes, 1, kMostRows / kernel_.rows);
    groups_ = std::min(groups_, parts(parts(p_.rows(), 4 * threads), kernel_.rows));
    const double d = static_cast<double>(p_.channels), g = (kernel_.roundings * (d + 1) + 16) * 0x1p-24;
    relative_ = g < 0.25 ? g / (1 - g) : INFINITY;
    absolute_ = (d + 4) * 0x1p-148, exact_ = (d + 8) * 0x1p-53;
    depth_ = (d + 8) * 0x1p-24, lost_ = std::sqrt(d) * 0x1p-72;
  }

  void run() {
    const int64_t block = groups_ * kernel_.rows;
    for (int64_t head = 0; head < p_.heads; ++head) {
      prepare(head);
      on_threads(parts(p_.rows(), block), [&](int64_t i) { find(head, i * block, std::min((i + 1) * block, p_.rows())); });
    }
    if (p_.rescored) p_.rescored[0] += several_, p_.rescored[1] += compared_;
  }

 private:
  void prepare(int64_t head);
  void measure();
  void pack_codes();
  double bound(float squares) const;
  void find(int64_t head, int64_t begin, int64_t end);
  int64_t find_certified(int64_t head, int64_t begin, int64_t end, Scratch& s);
  int64_t collect(int64_t head, int64_t begin, const int64_t* rows, int64_t count, Candidates* found, Scratch& s);
  int64_t nearest_of(int64_t head, int64_t row, const Candidates& candidates, Scratch& s) const;
  void pack(int64_t head, const int64_t* rows, int64_t count, float* to, float* squares, Scratch& s) const;
  Ahead rows_ahead(int64_t head, int64_t first) const;
  double row_norm(int64_t at, Scratch& s) const;
  void widen(int64_t head, int64_t row, Scratch& s) const;
  Scratch& scratch() const;
  const char* code(int64_t k) const { return element(book_.codes, k * p_.channels, p_.type); }
  double distance(int64_t k, Scratch& s) const { return kernel_.distance[type_](s.row, code(k), p_.channels, code_norm(k)); }
  double code_norm(int64_t k) const { return p_.cosine ? book_.norms[k] : 0; }
  PackedCodes tiles(int64_t first, int64_t last) const {
    const int64_t size = kernel_.codes;
    return {book_.values + first * size * p_.channels, book_.half + first * size, last - first, first};
  }

  const VqProblem& p_;
  const VqKernel& kernel_;
  const int type_;
  bool packed_;
  Buffer large_;
  Codebook book_;
  int64_t groups_;  // of rows in a block
  double relative_, absolute_, exact_, depth_, lost_;  // see `bound`
  std::atomic<int64_t> several_{0}, compared_{0};  // rows
};

void Search::prepare(int64_t head) {
  book_.codes = element(p_.codebook, head * p_.codes * p_.channels, p_.type);
  book_.mean.assign(p_.channels, 0.f);
  book_.scale = 1;
  book_.certified = packed_;
  measure();
  if (book_.certified) pack_codes();
}

// The codes' norms, or their mean and magnitude.
void Search::measure() {
  const int64_t k = p_.codes, d = p_.channels;
  if (p_.cosine) {
    book_.norms.resize(k);
    on_threads(parts(k, kNorms), [&](int64_t i) {
      Scratch& s = scratch();
      for (int64_t c = i * kNorms; c < std::min(k, (i + 1) * kNorms); ++c) {
        kernel_.widen[type_](code(c), 1, d, 0, s.row);
        book_.norms[c] = kernel_.norm(s.row, d);
      }
    });
  } else if (packed_) {
    std::vector<float> magnitudes(parts(d, kColumns));
    on_threads(parts(d, kColumns), [&](int64_t i) {
      magnitudes[i] = kernel_.mean[type_](book_.codes, k, d, i * kColumns, std::min(kColumns, d - i * kColumns), book_.mean.data());
    });
    const float largest = *std::max_element(magnitudes.begin(), magnitudes.end());
    book_.certified = std::isfinite(largest);
    // Within these limits neither codes nor rows of their size overflow, and what underflows does not matter.
    if (book_.certified && largest > 0) book_.scale = std::ldexp(1.f, std::clamp(-std::ilogb(largest), -100, 100));
  }
}

void Search::pack_codes() {
  const int64_t d = p_.channels;
  std::vector<float> halves(book_.tiles);  // the largest of each tile
  on_threads(book_.tiles, [&](int64_t t) {
    int64_t offsets[kMostTile];
    float scales[kMostTile];
    const int64_t first = t * kernel_.codes, count = std::min<int64_t>(kernel_.codes, p_.codes - first);
    for (int64_t i = 0; i < count; ++i) {
      offsets[i] = (first + i) * d;
      scales[i] = p_.cosine ? inverse(code_norm(first + i)) : book_.scale;
    }
    float* half = const_cast<float*>(book_.half) + first;
    kernel_.pack_codes[type_]({book_.codes, offsets, count, 1, false}, d, book_.mean.data(), scales, const_cast<float*>(book_.values) + first * d, half);
    for (int64_t i = 0; i < count; ++i) halves[t] = std::isfinite(half[i]) ? std::max(halves[t], half[i]) : INFINITY;
  });
  const double most = *std::max_element(halves.begin(), halves.end());
  book_.largest = std::sqrt(2 * most) * (1 + 0x1p-20);
  book_.certified = std::isfinite(most);
}

// B for a row with this sum of squares, which float32 has rounded and perhaps lost; infinite where scores could overflow.
double Search::bound(float squares) const {
  const double norm = std::sqrt(static_cast<double>(squares)) * (1 + depth_) + lost_, m = book_.largest, s = m * m / 2 + norm * m;
  return s < 0x1p120 ? relative_ * s + absolute_ * (1 + m + norm) + exact_ * (norm * norm / 2 + s) : INFINITY;
}

void Search::find(int64_t head, int64_t begin, int64_t end) {
  Scratch& s = scratch();
  s.index.assign(groups_ * kernel_.rows, kUnknown);
  int64_t several = 0, compared = 0;
  if (book_.certified) several = find_certified(head, begin, end, s);
  for (int64_t r = begin; r < end; ++r) {
    Nearest found{s.index[r - begin], 0};
    if (found.index == kUnknown || p_.distances) widen(head, r, s);
    if (found.index == kUnknown) {
      found = kernel_.nearest[type_](s.row, book_.codes, p_.codes, p_.channels, p_.cosine ? book_.norms.data() : nullptr);
      ++compared;
    } else if (p_.distances) {
      found.distance = distance(found.index, s);
    }
    p_.indices[p_.at(head, r)] = found.index;
    if (p_.distances) p_.distances[p_.at(head, r)] = static_cast<float>(found.distance);
  }
  several_ += several, compared_ += compared;
}

// The index of each row of a block, or kUnknown where all codes must be compared; returns how many rows had several candidates.
int64_t Search::find_certified(int64_t head, int64_t begin, int64_t end, Scratch& s) {
  const int64_t size = kernel_.rows, d = p_.channels, groups = parts(end - begin, size);
  int64_t rows[kMostTile];
  const auto pack_group = [&](int64_t g) {
    const int64_t first = begin + g * size, count = std::min(size, end - first);
    for (int64_t i = 0; i < count; ++i) rows[i] = first + i;
    pack(head, rows, count, s.x + g * size * d, s.squares + g * size, s);
    kernel_.reset(s.state + g * size * kernel_.state);
  };
  const int64_t step = std::max<int64_t>(1, kCodeBytes / (4 * kernel_.codes * d));
  for (int64_t t = 0; t < book_.tiles; t += step) {
    const PackedCodes codes = tiles(t, std::min(t + step, book_.tiles));
    for (int64_t g = 0; g < groups; ++g) {
      if (t == 0) pack_group(g);
      kernel_.scan(s.x + g * size * d, codes, d, s.state + g * size * kernel_.state, t == 0 ? rows_ahead(head, begin + (g + 1) * size) : Ahead{});
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    kernel_.finish(s.state + g * size * kernel_.state, s.first + g * size, s.second + g * size, s.index.data() + g * size);
  }
  int64_t several = 0, waiting = 0;
  Candidates found[kMostTile];
  const auto run_waiting = [&] {
    several -= collect(head, begin, rows, waiting, found, s);
    waiting = 0;
  };
  for (int64_t i = 0; i < end - begin; ++i) {
    const double limit = s.first[i] + 2 * bound(s.squares[i]);
    const bool finite = std::abs(limit) < 0x1p126;
    if (finite && s.second[i] > limit) continue;
    s.index[i] = kUnknown;
    if (!finite) continue;
    ++several;
    Candidates& row = found[waiting];
    row.limit = std::nextafter(static_cast<float>(limit), INFINITY), row.count = 0;
    if (kernel_.kept(s.state + i * kernel_.state, &row)) {
      s.index[i] = nearest_of(head, begin + i, row, s);
      continue;
    }
    row.count = 0, rows[waiting++] = begin + i;
    if (waiting == size) run_waiting();
  }
  if (waiting) run_waiting();
  return several;
}

// Runs some rows through the products again to find all their candidates; returns how many rows have too many.
int64_t Search::collect(int64_t head, int64_t begin, const int64_t* rows, int64_t count, Candidates* found, Scratch& s) {
  for (int64_t i = count; i < kernel_.rows; ++i) found[i].limit = -INFINITY, found[i].count = 0;
  pack(head, rows, count, s.x, s.again, s);  // over the block's first rows, which have been scanned
  kernel_.collect(s.x, tiles(0, book_.tiles), p_.channels, found);
  int64_t overflowed = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool fits = found[i].count <= Candidates::kMost;
    if (fits) s.index[rows[i] - begin] = nearest_of(head, rows[i], found[i], s);
    overflowed += !fits;
  }
  return overflowed;
}

int64_t Search::nearest_of(int64_t head, int64_t row, const Candidates& candidates, Scratch& s) const {
  widen(head, row, s);
  Nearest best{kUnknown, 0};
  for (int64_t i = 0; i < candidates.count; ++i) {
    const int64_t k = candidates.codes[i];
    const double d = distance(k, s);
    if (best.index == kUnknown || d < best.distance || (d == best.distance && k < best.index)) best = {k, d};
  }
  return best.index;
}

// The group of rows from `first` on, where it lies in one piece.
Ahead Search::rows_ahead(int64_t head, int64_t first) const {
  const int64_t rows = std::min<int64_t>(kernel_.rows, p_.rows() - first);
  if (rows <= 0 || p_.inner != 1 || p_.x_channel != 1 || p_.x_outer > 2 * p_.channels) return {};
  const char* from = element(p_.x, p_.x_at(head, first), p_.type);
  return {from, element(p_.x, p_.x_at(head, first + rows), p_.type) - from};
}

// Gathers rows of x for the products.
void Search::pack(int64_t head, const int64_t* rows, int64_t count, float* to, float* squares, Scratch& s) const {
  int64_t offsets[kMostTile];
  float scales[kMostTile];
  bool adjacent = p_.x_inner == 1 && p_.x_channel != 1;
  for (int64_t i = 0; i < count; ++i) {
    offsets[i] = p_.x_at(head, rows[i]);
    adjacent = adjacent && offsets[i] == offsets[0] + i;
    scales[i] = book_.scale;
    if (p_.cosine) scales[i] = inverse(row_norm(offsets[i], s));
  }
  kernel_.pack_rows[type_]({p_.x, offsets, count, p_.x_channel, adjacent}, p_.channels, book_.mean.data(), scales, to, squares);
}

double Search::row_norm(int64_t at, Scratch& s) const {
  kernel_.widen[type_](element(p_.x, at, p_.type), p_.x_channel, p_.channels, 0, s.row);
  return kernel_.norm(s.row, p_.channels);
}

// A row of x in float64, with the cosine metric divided by its norm.
void Search::widen(int64_t head, int64_t row, Scratch& s) const {
  const int64_t at = p_.x_at(head, row);
  const double norm = p_.cosine ? row_norm(at, s) : 0;
  kernel_.widen[type_](element(p_.x, at, p_.type), p_.x_channel, p_.channels, norm, s.row);
}

Scratch& Search::scratch() const {
  thread_local Scratch s;
  const int64_t rows = groups_ * kernel_.rows, wide = (p_.channels + 8) * 2;
  float* next = static_cast<float*>(s.memory.reserve(4 * (wide + rows * (p_.channels + kernel_.state + 3))));
  const auto take = [&](int64_t floats) { return std::exchange(next, next + floats); };
  s.x = take(rows * p_.channels), s.state = take(rows * kernel_.state);
  s.row = reinterpret_cast<double*>(take(wide));
  s.squares = take(rows), s.first = take(rows), s.second = take(rows);
  return s;
}

}  // namespace

VqProblem vq_problem(const Tensor& x, const Tensor& codebook, const VqShape& shape, bool cosine, const Tensor& indices,
                     const std::optional<Tensor>& distances, const char* op) {
  VqProblem p{};
  p.x = x.const_data_ptr(), p.codebook = codebook.const_data_ptr(), p.type = element_of(x.scalar_type(), op);
  p.outer = shape.outer, p.heads = shape.heads, p.channels = shape.channels, p.inner = shape.inner, p.codes = shape.codes;
  p.x_outer = x.stride(0), p.x_head = x.stride(1), p.x_channel = x.stride(2), p.x_inner = x.stride(3);
  p.cosine = cosine;
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  p.distances = distances ? static_cast<float*>(distances->mutable_data_ptr()) : nullptr;
  return p;
}

void nearest_codes(const VqProblem& problem) { Search(problem).run(); }

}  // namespace fastsr::cpu
