// fastsr::vector_quantize and its backward on a CPU: what follows the search, memory-bound.
//
//     chunk of 256 rows   x --+--> quantized = codebook[index]        each chunk's loss is summed on its own in float64, and the chunks'
//                             +--> |x - quantized|^2                  losses in order: no bit depends on the thread count
//     rows sorted by code     -->  sums of each code's rows in float64, in ascending order of the rows
//
// Where the channels of a row lie side by side a code's rows are gathered one after the other; where pixels do (channels first), a task
// is a channel: it reads all its pixels in order and adds each to its code's sum. Both add in the same order.
//
// Moves      forward: x twice, a code and `quantized` once per row; dx: grad, x, quantized and dx once; dcodebook: x and quantized once
// Keeps      8 bytes per row of a head (their order), 8 per code
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "common/vq_args.h"
#include "cpu/conv_driver.h"
#include "cpu/vq_search.h"

namespace fastsr::cpu {
namespace {

constexpr int64_t kChunk = 256;        // rows of a task
constexpr int64_t kCodes = 16;         // codes of a task
constexpr double kSmallestNorm = 1e-12;  // as in the reference

template <class Call>
void dispatch(ScalarType type, const char* op, const Call& call) {
  switch (element_of(type, op)) {
    case Element::f32: return call(float());
    case Element::bf16: return call(torch::headeronly::BFloat16());
    default: return call(torch::headeronly::Half());
  }
}

// (outer, heads, channels, inner) by its strides.
template <class T>
struct View {
  T* data = nullptr;
  int64_t o = 0, h = 0, c = 0, i = 0, inner = 1;

  View() = default;
  explicit View(const Tensor& t)
      : data(static_cast<T*>(const_cast<void*>(t.const_data_ptr()))), o(t.stride(0)), h(t.stride(1)), c(t.stride(2)), i(t.stride(3)), inner(t.size(3)) {}
  T* row(int64_t head, int64_t r) const { return data + head * h + (inner == 1 ? r * o : r / inner * o + r % inner * i); }
  bool rows_whole() const { return c == 1 || inner == 1; }
};

// Whether a row counts, and where its index stands.
struct Rows {
  const int64_t* indices;
  const bool* mask;  // or null
  VqShape shape;

  Rows(const std::optional<Tensor>& indices, const std::optional<Tensor>& mask, const VqShape& s)
      : indices(indices ? static_cast<const int64_t*>(indices->const_data_ptr()) : nullptr),
        mask(mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr), shape(s) {}
  int64_t per_head() const { return shape.outer * shape.inner; }
  int64_t at(int64_t head, int64_t r) const { return (r / shape.inner * shape.heads + head) * shape.inner + r % shape.inner; }
  bool counts(int64_t at) const { return !mask || mask[at]; }
  // M D, at least 1.
  double values() const {
    const int64_t all = per_head() * shape.heads, rows = mask ? std::count(mask, mask + all, true) : all;
    return static_cast<double>(std::max<int64_t>(1, rows * shape.channels));
  }
};

// f(row of the chunk, channel) for all, in the order in which they lie.
template <class F>
void each(bool rows_whole, int64_t rows, int64_t channels, const F& f) {
  if (rows_whole) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < channels; ++c) f(r, c);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t r = 0; r < rows; ++r) f(r, c);
    }
  }
}

// task(head, first row, rows, number of the chunk) on torch's threads.
template <class Task>
void chunks(const Rows& rows, const Task& task) {
  const int64_t per_head = (rows.per_head() + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, per_head * rows.shape.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_head * kChunk;
      task(i / per_head, first, std::min(kChunk, rows.per_head() - first), i);
    }
  });
}

// Fills `quantized`; returns the sum of |x - quantized|^2 over the rows that count.
template <class T>
double gather(const View<T>& x, const View<T>& quantized, const T* codebook, const Rows& rows) {
  const int64_t d = rows.shape.channels;
  std::vector<double> losses((rows.per_head() + kChunk - 1) / kChunk * rows.shape.heads);
  chunks(rows, [&](int64_t head, int64_t first, int64_t count, int64_t chunk) {
    const T *from[kChunk], *code[kChunk];
    T* to[kChunk];
    float weight[kChunk];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = rows.at(head, first + r);
      from[r] = x.row(head, first + r), to[r] = quantized.row(head, first + r);
      code[r] = codebook + (head * rows.shape.codes + rows.indices[at]) * d;
      weight[r] = rows.counts(at) ? 1.f : 0.f;
    }
    double loss = 0;
    each(x.rows_whole(), count, d, [&](int64_t r, int64_t c) {
      const T q = code[r][c];
      to[r][c * quantized.c] = q;
      const float difference = static_cast<float>(from[r][c * x.c]) - static_cast<float>(q);
      if (weight[r] != 0) loss += static_cast<double>(difference) * difference;
    });
    losses[chunk] = loss;
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0);
}

// The rows of a head that count, in order of their codes; offsets[k] is where those of code k begin.
struct Sorted {
  std::vector<int64_t> offsets, order;

  Sorted(const Rows& rows, int64_t head) : offsets(rows.shape.codes + 1) {
    const int64_t n = rows.per_head();
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = rows.at(head, r);
      const int64_t k = rows.indices[at];
      STD_TORCH_CHECK(k >= 0 && k < rows.shape.codes, "vector_quantize: an index is ", k, "; expected 0 to ", rows.shape.codes - 1);
      if (rows.counts(at)) ++offsets[k + 1];
    }
    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
    order.resize(offsets.back());
    std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = rows.at(head, r);
      if (rows.counts(at)) order[next[rows.indices[at]]++] = r;
    }
  }
};

// sums (codes, channels) of a head = factor * the sum of x, or of minuend - x where there is one, over each code's rows.
template <class T, class Sum>
void segment_sums(const View<T>& x, const View<T>* minuend, const Rows& rows, int64_t head, const Sorted& sorted, double factor, Sum* sums) {
  const int64_t d = rows.shape.channels, k = rows.shape.codes;
  const auto value = [&](const T* p, const T* q, int64_t c) {
    const float v = static_cast<float>(p[c * x.c]);
    return static_cast<double>(q ? static_cast<float>(q[c * minuend->c]) - v : v);
  };
  if (x.rows_whole()) {
    std::atomic<int64_t> next{0};  // codes have few rows or many: every thread takes from one queue
    const int64_t tasks = (k + kCodes - 1) / kCodes;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
      std::vector<double> sum(d);
      for (int64_t task = next++; task < tasks; task = next++) {
        for (int64_t code = task * kCodes; code < std::min(k, (task + 1) * kCodes); ++code) {
          std::fill(sum.begin(), sum.end(), 0.0);
          for (int64_t i = sorted.offsets[code]; i < sorted.offsets[code + 1]; ++i) {
            const T *p = x.row(head, sorted.order[i]), *q = minuend ? minuend->row(head, sorted.order[i]) : nullptr;
            for (int64_t c = 0; c < d; ++c) sum[c] += value(p, q, c);
          }
          for (int64_t c = 0; c < d; ++c) sums[code * d + c] = static_cast<Sum>(static_cast<float>(factor * sum[c]));
        }
      }
    });
    return;
  }
  torch::stable::parallel_for(0, d, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(k);
    for (int64_t c = begin; c < end; ++c) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t o = 0; o < rows.shape.outer; ++o) {
        const int64_t first = o * rows.shape.inner, at = rows.at(head, first);
        const T *p = x.row(head, first), *q = minuend ? minuend->row(head, first) : nullptr;
        for (int64_t i = 0; i < rows.shape.inner; ++i) {
          if (rows.counts(at + i)) sum[rows.indices[at + i]] += value(p + i * x.i, q ? q + i * minuend->i : nullptr, c);
        }
      }
      for (int64_t code = 0; code < k; ++code) sums[code * d + c] = static_cast<Sum>(static_cast<float>(factor * sum[code]));
    }
  });
}

void vector_quantize(Tensor x, Tensor codebook, std::optional<Tensor> mask, bool cosine, bool /* one form serves */, Tensor quantized, Tensor indices,
                     Tensor loss, Tensor counts, Tensor sums, std::optional<Tensor> distances) {
  const char* op = "vector_quantize";
  const VqShape s = vector_quantize_shape(x, codebook, mask, quantized, indices, loss, counts, sums, distances);
  nearest_codes(vq_problem(x, codebook, s, cosine, indices, distances, op));
  const Rows rows(indices, mask, s);
  dispatch(x.scalar_type(), op, [&](auto type) {
    using T = decltype(type);
    const View<T> from(x);
    const double total = gather(from, View<T>(quantized), static_cast<const T*>(codebook.const_data_ptr()), rows);
    *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total / rows.values());
    for (int64_t head = 0; head < s.heads; ++head) {
      const Sorted sorted(rows, head);
      int64_t* count = static_cast<int64_t*>(counts.mutable_data_ptr()) + head * s.codes;
      for (int64_t k = 0; k < s.codes; ++k) count[k] = sorted.offsets[k + 1] - sorted.offsets[k];
      float* sum = static_cast<float*>(sums.mutable_data_ptr()) + head * s.codes * s.channels;
      segment_sums<T, float>(from, nullptr, rows, head, sorted, 1, sum);
    }
  });
}

// The gradient of a chunk's rows through rotation and scaling, in three passes: norms, products, result.
template <class T>
void rotate(bool rows_whole, int64_t count, int64_t channels, T* const* g, int64_t gc, T* const* x, int64_t xc, T* const* q, int64_t qc,
            const float* weight, float commitment, T* const* dx, int64_t dc) {
  double xx[kChunk] = {}, qq[kChunk] = {}, mm[kChunk] = {}, gm[kChunk] = {}, gv[kChunk] = {};
  const auto u = [&](int64_t r, int64_t c) { return static_cast<double>(static_cast<float>(x[r][c * xc])) * xx[r]; };
  const auto v = [&](int64_t r, int64_t c) { return static_cast<double>(static_cast<float>(q[r][c * qc])) * qq[r]; };
  each(rows_whole, count, channels, [&](int64_t r, int64_t c) {
    const double a = static_cast<float>(x[r][c * xc]), b = static_cast<float>(q[r][c * qc]);
    xx[r] += a * a, qq[r] += b * b;
  });
  double scale[kChunk];
  for (int64_t r = 0; r < count; ++r) {
    const double x_norm = std::max(std::sqrt(xx[r]), kSmallestNorm), q_norm = std::max(std::sqrt(qq[r]), kSmallestNorm);
    scale[r] = q_norm / x_norm, xx[r] = 1 / x_norm, qq[r] = 1 / q_norm;
  }
  each(rows_whole, count, channels, [&](int64_t r, int64_t c) {
    const double grad = static_cast<float>(g[r][c * gc]), second = v(r, c), middle = u(r, c) + second;
    mm[r] += middle * middle, gm[r] += grad * middle, gv[r] += grad * second;
  });
  for (int64_t r = 0; r < count; ++r) {
    const double norm = std::max(std::sqrt(mm[r]), kSmallestNorm);
    gm[r] /= norm * norm;
  }
  each(rows_whole, count, channels, [&](int64_t r, int64_t c) {
    const double first = u(r, c), grad = static_cast<float>(g[r][c * gc]);
    const double turned = scale[r] * (grad - 2 * (first + v(r, c)) * gm[r] + 2 * first * gv[r]);
    const double pull = weight[r] == 0 ? 0 : commitment * (static_cast<float>(x[r][c * xc]) - static_cast<float>(q[r][c * qc]));
    dx[r][c * dc] = static_cast<T>(static_cast<float>(turned + pull));
  });
}

void vector_quantize_dx(std::optional<Tensor> grad, std::optional<Tensor> commitment_grad, Tensor x, Tensor quantized, std::optional<Tensor> mask,
                        bool rotation, Tensor dx) {
  const char* op = "vector_quantize_dx";
  const VqShape s{x.size(0), x.size(1), x.size(2), x.size(3), 0};
  check_like(grad, x, op, "grad");
  check_like(quantized, x, op, "quantized");
  check_like(dx, x, op, "dx");
  check_per_row(mask, s, ScalarType::Bool, op, "mask");
  if (commitment_grad) check_statistic(*commitment_grad, 1, ScalarType::Float, op, "commitment_grad");
  const Rows rows(std::nullopt, mask, s);
  const double pull = commitment_grad ? 2 * *static_cast<const float*>(commitment_grad->const_data_ptr()) / rows.values() : 0;
  dispatch(x.scalar_type(), op, [&](auto type) {
    using T = decltype(type);
    const View<T> from(x), code(quantized), to(dx), g = grad ? View<T>(*grad) : View<T>();
    chunks(rows, [&](int64_t head, int64_t first, int64_t count, int64_t) {
      T *a[kChunk], *b[kChunk], *c[kChunk], *d[kChunk];
      float weight[kChunk];
      for (int64_t r = 0; r < count; ++r) {
        a[r] = from.row(head, first + r), b[r] = code.row(head, first + r), c[r] = to.row(head, first + r);
        d[r] = grad ? g.row(head, first + r) : nullptr;
        weight[r] = commitment_grad && rows.counts(rows.at(head, first + r)) ? static_cast<float>(pull) : 0.f;
      }
      if (rotation && grad) return rotate<T>(from.rows_whole(), count, s.channels, d, g.c, a, from.c, b, code.c, weight, static_cast<float>(pull), c, to.c);
      each(from.rows_whole(), count, s.channels, [&](int64_t r, int64_t channel) {
        const float straight = grad ? static_cast<float>(d[r][channel * g.c]) : 0.f;
        const float difference = static_cast<float>(a[r][channel * from.c]) - static_cast<float>(b[r][channel * code.c]);
        c[r][channel * to.c] = static_cast<T>(weight[r] == 0 ? straight : straight + weight[r] * difference);
      });
    });
  });
}

void vector_quantize_dcodebook(Tensor codebook_grad, Tensor x, Tensor quantized, Tensor indices, std::optional<Tensor> mask,
                               bool /* one form serves */, Tensor dcodebook) {
  const char* op = "vector_quantize_dcodebook";
  const VqShape s = vq_shape(x, dcodebook, op);
  check_like(quantized, x, op, "quantized");
  check_per_row(indices, s, ScalarType::Long, op, "indices");
  check_per_row(mask, s, ScalarType::Bool, op, "mask");
  check_statistic(codebook_grad, 1, ScalarType::Float, op, "codebook_grad");
  const Rows rows(indices, mask, s);
  const double factor = 2 * *static_cast<const float*>(codebook_grad.const_data_ptr()) / rows.values();
  dispatch(x.scalar_type(), op, [&](auto type) {
    using T = decltype(type);
    const View<T> from(x), code(quantized);
    for (int64_t head = 0; head < s.heads; ++head) {
      T* to = static_cast<T*>(dcodebook.mutable_data_ptr()) + head * s.codes * s.channels;
      segment_sums<T, T>(from, &code, rows, head, Sorted(rows, head), factor, to);
    }
  });
}

}  // namespace
}  // namespace fastsr::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsr, CPU, m) {
  m.impl("vector_quantize", TORCH_BOX(&fastsr::cpu::vector_quantize));
  m.impl("vector_quantize_dx", TORCH_BOX(&fastsr::cpu::vector_quantize_dx));
  m.impl("vector_quantize_dcodebook", TORCH_BOX(&fastsr::cpu::vector_quantize_dcodebook));
}
