// fastsr::channel_attention and its backward on a CPU: two passes over the pictures, and between them the gate.
//
//     image n   | strip 0 | strip 1 | ... | last |       pass 1: a sum per strip and channel, in any order ------------->
//               of about 128 KB, in memory order         sums of the strips in their order -> p -> gate -> s
//                                                         pass 2: out = s * x + residual, backwards <--------------------
//
// Strips are cut by the pictures' shape, so no bit depends on the number of threads. Images that fit a core's cache are
// worked on whole by one thread, pass 2 right behind pass 1; larger ones are shared out strip by strip, and pass 2 goes backwards, so
// that it begins with what its thread read last.
//
// Layouts    channels-last and channel slices of it, where an image is a row of pixels of C values; and contiguous planes (NCHW),
//            where it is C pictures of one channel: the same text, with one gate value for a whole strip.
// Moves      forward x twice, residual, out; backward g twice, x, dx
// Limit      memory bandwidth. Outputs too large for a cache are written around it, which saves reading them first.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/channel_attention_args.h"
#include "cpu/gate.h"
#include "cpu/pages.h"

namespace fastsr::cpu {
namespace {

constexpr int64_t kStrip = 1 << 15;        // values of a strip
constexpr int64_t kPattern = 1 << 12;      // most values of a group of pixels
constexpr int64_t kOneThread = 1 << 20;    // bytes of an image that one thread works on alone
constexpr int64_t kStreamed = 16 << 20;    // bytes of an output that is written around the cache

// A tensor's pixels, in elements. Null data stands for no tensor.
struct Plane {
  char* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;

  Plane() = default;
  explicit Plane(const Tensor& t)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), n(t.stride(0)), c(t.stride(1)), h(t.stride(2)), w(t.stride(3)) {}
};

// How the images of an op's tensors are cut: into `parts` pictures of `channels` channels side by side, each into strips.
struct Cut {
  Element type;
  int64_t batch, parts, channels, height, width;
  int64_t strip, strips;  // pixels of a strip, strips of a picture

  int64_t size() const { return type == Element::f32 ? 4 : 2; }
  int64_t pixels() const { return height * width; }
  int64_t items() const { return parts * strips; }
  int64_t image_bytes() const { return parts * channels * pixels() * size(); }
};

template <class... More>
Cut cut_images(const Tensor& x, const More&... more) {
  const bool pixels = picture_layout(x, more...).pixels;
  Cut cut{element_of(x.scalar_type(), "channel_attention"), x.size(0), pixels ? 1 : x.size(1), pixels ? x.size(1) : 1, x.size(2), x.size(3), 0, 0};
  // A whole number of groups for vectors of any length.
  const int64_t unit = std::lcm(cut.channels, 128) / cut.channels;
  cut.strip = std::max<int64_t>(1, kStrip / cut.channels / unit) * unit;
  cut.strips = (cut.pixels() + cut.strip - 1) / cut.strip;
  return cut;
}

// How a run of pixels is taken by a kernel's vectors. `dense`: pixels lie end to end.
struct Pattern {
  int64_t pixels, vectors, last, channels, lanes;

  Pattern(int64_t lanes, int64_t channels, bool dense) : pixels(1), channels(channels), lanes(lanes) {
    const int64_t values = std::lcm(lanes, channels);
    dense &= values <= kPattern;
    if (dense) {
      pixels = values / channels;
      while (pixels * channels < 8 * lanes) pixels *= 2;  // enough vectors to hide the additions' latency
    }
    vectors = (pixels * channels + lanes - 1) / lanes;
    last = pixels * channels - (vectors - 1) * lanes;
  }
  int64_t values() const { return vectors * lanes; }
  Run run(int64_t count) const { return {count / pixels, vectors, last, count % pixels * channels}; }

  // The `channels` values of `from`, in the place of each value of a group.
  void spread(const float* from, float scale, float* to) const {
    for (int64_t c = 0; c < channels; ++c) to[c] = scale * from[c];
    for (int64_t i = channels; i < pixels * channels; ++i) to[i] = to[i - channels];
    std::fill(to + pixels * channels, to + values(), 0.f);
  }
  // The sum per channel of a group's sums, which are overwritten.
  void fold(float* sums, float* to) const {
    int64_t left = pixels;
    for (; left % 2 == 0; left /= 2) {
      for (int64_t i = 0; i < left / 2 * channels; ++i) sums[i] += sums[i + left / 2 * channels];
    }
    for (int64_t p = 1; p < left; ++p) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += sums[c + p * channels];
    }
    std::copy_n(sums, channels, to);
  }
};

// Calls `piece(pixel offset in the strip, pixels, row, column)` for the pieces of a strip that lie in one line of memory.
template <class Piece>
void for_pieces(const Cut& cut, int64_t strip, bool rows_join, const Piece& piece) {
  const int64_t begin = strip * cut.strip, end = std::min(begin + cut.strip, cut.pixels());
  if (rows_join) return piece(end - begin, begin / cut.width, begin % cut.width);
  for (int64_t p = begin; p < end;) {
    const int64_t column = p % cut.width, count = std::min(end - p, cut.width - column);
    piece(count, p / cut.width, column);
    p += count;
  }
}

// One tensor or several, as the pieces of a pass see them.
struct Lines {
  bool dense, join;  // pixels end to end; rows too
  explicit Lines(const Cut& cut, std::initializer_list<Plane> planes) : dense(true), join(true) {
    for (const Plane& p : planes) {
      if (!p.data) continue;
      dense &= p.w == cut.channels || cut.width == 1;
      join &= p.h == cut.width * p.w || cut.height == 1;
    }
  }
};

char* at(const Cut& cut, const Plane& p, int64_t image, int64_t part, int64_t row, int64_t column) {
  return p.data ? p.data + (image * p.n + part * p.c + row * p.h + column * p.w) * cut.size() : nullptr;
}

// Pass 1: sums over pixels of x, or of g * x.
class Sums {
 public:
  Sums(const Cut& cut, Plane x, Plane g)
      : cut_(cut), x_(x), g_(g), kernel_(choose_attention()), lines_(cut, {x, g}), pattern_(kernel_.lanes, cut.channels, lines_.dense) {}

  int64_t floats() const { return cut_.items() * cut_.channels; }

  // Items [begin, end) of an image: each item's sum per channel to its place in `partial`.
  void items(int64_t image, int64_t begin, int64_t end, float* partial) const {
    thread_local Buffer buffer;
    float* sums = static_cast<float*>(buffer.reserve(pattern_.values() * 4));
    for (int64_t item = begin; item < end; ++item) {
      std::fill_n(sums, pattern_.values(), 0.f);
      for_pieces(cut_, item % cut_.strips, lines_.join, [&](int64_t count, int64_t row, int64_t column) {
        const int64_t part = item / cut_.strips;
        kernel_.sum[static_cast<int>(cut_.type)](pattern_.run(count), at(cut_, x_, image, part, row, column), x_.w * pattern_.pixels,
                                                 at(cut_, g_, image, part, row, column), g_.w * pattern_.pixels, sums);
      });
      pattern_.fold(sums, partial + item * cut_.channels);
    }
  }

  // The image's sums times `scale`, from those of its items.
  void join(const float* partial, double scale, float* to) const {
    for (int64_t part = 0; part < cut_.parts; ++part, partial += cut_.strips * cut_.channels) {
      for (int64_t c = 0; c < cut_.channels; ++c) {
        double sum = 0.0;
        for (int64_t i = 0; i < cut_.strips; ++i) sum += partial[i * cut_.channels + c];
        *to++ = static_cast<float>(sum * scale);
      }
    }
  }

 private:
  const Cut& cut_;
  Plane x_, g_;
  const AttentionKernel& kernel_;
  Lines lines_;
  Pattern pattern_;
};

// Pass 2: out = scale * factors * x + residual, or + shifts.
class Scaling {
 public:
  Scaling(const Cut& cut, Plane x, Plane residual, Plane out, float scale)
      : cut_(cut), x_(x), residual_(residual), out_(out), scale_(scale), kernel_(choose_attention()), lines_(cut, {x, residual, out}),
        pattern_(kernel_.lanes, cut.channels, lines_.dense) {
    if (!out.data || out.data == x.data || out.data == residual.data) return;
    const int64_t bytes = cut.batch * cut.image_bytes();
    fresh_ = lines_.join && bytes >= kOneThread && !pages_present(out.data, bytes);
    stream_ = !fresh_ && lines_.dense && pattern_.last == pattern_.lanes && bytes >= kStreamed;
  }

  // Items [begin, end) of an image, backwards; factors and shifts (unless null) hold its values per channel.
  void items(int64_t image, int64_t begin, int64_t end, const float* factors, const float* shifts) const {
    thread_local Buffer buffer;
    float* spread = static_cast<float*>(buffer.reserve(2 * pattern_.values() * 4));
    ScaleJob job{};
    job.factors = spread, job.shifts = shifts ? spread + pattern_.values() : nullptr;
    job.x_unit = x_.w * pattern_.pixels, job.residual_unit = residual_.w * pattern_.pixels, job.out_unit = out_.w * pattern_.pixels;
    for (int64_t item = end - 1, spread_part = -1; item >= begin; --item) {
      const int64_t part = item / cut_.strips;
      if (part != spread_part) {
        pattern_.spread(factors + part * cut_.channels, scale_, spread);
        if (shifts) pattern_.spread(shifts + part * cut_.channels, 1.f, spread + pattern_.values());
        spread_part = part;
      }
      for_pieces(cut_, item % cut_.strips, lines_.join, [&](int64_t count, int64_t row, int64_t column) {
        job.run = pattern_.run(count);
        job.x = at(cut_, x_, image, part, row, column);
        job.residual = at(cut_, residual_, image, part, row, column);
        job.out = at(cut_, out_, image, part, row, column);
        if (fresh_) provide_pages(job.out, count * out_.w * cut_.size());
        job.stream = stream_ && reinterpret_cast<uintptr_t>(job.out) % 64 == 0;
        kernel_.scale[static_cast<int>(cut_.type)](job);
      });
    }
  }

 private:
  const Cut& cut_;
  Plane x_, residual_, out_;
  float scale_;
  const AttentionKernel& kernel_;
  Lines lines_;
  Pattern pattern_;
  bool fresh_ = false, stream_ = false;  // pages that were never written; too large for a cache
};

// Runs both passes over all images. `between(image, partial sums)` makes what pass 2 needs; `scaling` may be null.
template <class Between, class Second>
void two_passes(const Cut& cut, const Sums& sums, const Between& between, const Second& second) {
  const int64_t threads = torch::stable::get_num_threads(), image = cut.image_bytes();
  if (image <= kOneThread && (cut.batch % threads == 0 || cut.batch >= 4 * threads || cut.batch * image <= kOneThread / 8)) {
    torch::stable::parallel_for(0, cut.batch, std::max<int64_t>(1, kOneThread / 8 / image), [&](int64_t begin, int64_t end) {
      thread_local Buffer buffer;
      float* partial = static_cast<float*>(buffer.reserve(sums.floats() * 4));
      for (int64_t n = begin; n < end; ++n) {
        sums.items(n, 0, cut.items(), partial);
        between(n, partial);
        second(n, 0, cut.items());
      }
    });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kOneThread / 16 * cut.items() / image);
  Buffer buffer;
  float* partial = static_cast<float*>(buffer.reserve(sums.floats() * 4));
  for (int64_t n = 0; n < cut.batch; ++n) {
    torch::stable::parallel_for(0, cut.items(), grain, [&](int64_t begin, int64_t end) { sums.items(n, begin, end, partial); });
    between(n, partial);
    torch::stable::parallel_for(0, cut.items(), grain, [&](int64_t begin, int64_t end) { second(n, begin, end); });
  }
}

// A given vector per image and channel, or scratch for one.
float* vectors(const std::optional<Tensor>& given, const Tensor& x, const char* name, std::vector<float>& scratch) {
  if (!given) {
    scratch.resize(x.size(0) * x.size(1));
    return scratch.data();
  }
  check_attention_vector(*given, x, name);
  return static_cast<float*>(given->mutable_data_ptr());
}

void channel_attention(Tensor x, std::optional<Tensor> down_weight, std::optional<Tensor> down_bias, Tensor up_weight,
                       std::optional<Tensor> up_bias, std::optional<Tensor> residual, Tensor out, std::optional<Tensor> pooled,
                       std::optional<Tensor> gates, double res_scale, int64_t gate, int64_t activation) {
  const Cut cut = residual ? cut_images(x, *residual, out) : cut_images(x, out);
  const GateWeights weights =
      gate_weights("channel_attention", x.scalar_type(), x.size(1), down_weight, down_bias, up_weight, up_bias, gate, activation);
  std::vector<float> own[2];
  float *p = vectors(pooled, x, "pooled", own[0]), *s = vectors(gates, x, "gates", own[1]);
  if (x.numel() == 0) return;
  prefer_huge_output(out);
  const Sums sums(cut, Plane(x), {});
  const Scaling scaling(cut, Plane(x), residual ? Plane(*residual) : Plane(), Plane(out), static_cast<float>(res_scale));
  const auto between = [&](int64_t n, const float* partial) {
    sums.join(partial, 1.0 / static_cast<double>(cut.pixels()), p + n * weights.channels);
    gate_forward(weights, p + n * weights.channels, 1, s + n * weights.channels);
  };
  two_passes(cut, sums, between, [&](int64_t n, int64_t begin, int64_t end) { scaling.items(n, begin, end, s + n * weights.channels, nullptr); });
}

void* data_of(const std::optional<Tensor>& t) { return t ? t->mutable_data_ptr() : nullptr; }

void channel_attention_backward(Tensor grad, Tensor x, Tensor pooled, Tensor gates, std::optional<Tensor> down_weight,
                                std::optional<Tensor> down_bias, Tensor up_weight, std::optional<Tensor> dx,
                                std::optional<Tensor> ddown_weight, std::optional<Tensor> ddown_bias, std::optional<Tensor> dup_weight,
                                std::optional<Tensor> dup_bias, double res_scale, int64_t gate, int64_t activation) {
  const Cut cut = dx ? cut_images(x, grad, *dx) : cut_images(x, grad);
  const GateWeights weights =
      gate_weights("channel_attention", x.scalar_type(), x.size(1), down_weight, down_bias, up_weight, std::nullopt, gate, activation);
  std::vector<float> none;
  const float *p = vectors(pooled, x, "pooled", none), *s = vectors(gates, x, "gates", none);
  const int64_t channels = weights.channels;
  std::vector<float> memory(GateTape::floats(weights, cut.batch)), ds(cut.batch * channels), shifts(dx ? cut.batch * channels : 0);
  const GateTape tape(weights, cut.batch, memory.data());
  if (x.numel() > 0) {
    const Sums sums(cut, Plane(x), Plane(grad));
    if (dx) prefer_huge_output(*dx);
    const Scaling scaling(cut, Plane(grad), {}, dx ? Plane(*dx) : Plane(), static_cast<float>(res_scale));
    const auto between = [&](int64_t n, const float* partial) {
      const int64_t at = n * channels;
      sums.join(partial, res_scale, ds.data() + at);
      float* shift = dx ? shifts.data() + at : nullptr;
      gate_backward(weights, tape, n, p + at, s + at, ds.data() + at, shift);
      for (int64_t c = 0; c < channels && shift; ++c) shift[c] /= static_cast<float>(cut.pixels());
    };
    two_passes(cut, sums, between, [&](int64_t n, int64_t begin, int64_t end) {
      if (dx) scaling.items(n, begin, end, s + n * channels, shifts.data() + n * channels);
    });
  }
  gate_weight_gradients(weights, tape, cut.batch, p, {data_of(ddown_weight), data_of(ddown_bias), data_of(dup_weight), data_of(dup_bias)});
}

}  // namespace
}  // namespace fastsr::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsr, CPU, m) {
  m.impl("channel_attention", TORCH_BOX(&fastsr::cpu::channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&fastsr::cpu::channel_attention_backward));
}
