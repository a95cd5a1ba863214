// Kernel choice, weight packing and input rows for the 3x3 convolution engine.
#include "cpu/conv_driver.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "cpu/channels.h"
#include "cpu/isa.h"
#include "cpu/rounding.h"

namespace fastsr::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
int64_t bytes_of(Element type) { return type == Element::f32 ? 4 : 2; }

// Output channels held in memory: whole groups, but the last group may be one vector narrower.
int64_t padded_outputs(const Kernel& kernel, int64_t cout) { return round_up(cout, kernel.lanes); }

// Values of the packed weights.
int64_t packed_values(const Kernel& kernel, int64_t cout, int64_t inputs) {
  return (cout <= kernel.few ? 3 : 9) * inputs * padded_outputs(kernel, cout);
}

// Packed position -> the tensor's output channel.
int64_t source_channel(int64_t position, int64_t cout, int64_t r) {
  const int64_t per_pixel = cout / (r * r);
  return position % per_pixel * r * r + position / per_pixel;
}

float to_float(const void* p, Element type, int64_t i) {
  switch (type) {
    case Element::f32: return static_cast<const float*>(p)[i];
    case Element::bf16: return static_cast<const BFloat16*>(p)[i];
    default: return static_cast<const Half*>(p)[i];
  }
}

// One group of outputs, input channels [begin, end) of the packed weights. Values pass through the type `Via`.
template <class From, class Via, class To>
void pack_block(const Kernel& kernel, const PackedConv& conv, const WeightView& weight, int64_t group, int64_t channel,
                int64_t channels, int64_t begin, int64_t end, int64_t r) {
  constexpr int64_t kUnit = sizeof(float) / sizeof(To);  // input channels side by side
  const int64_t first = group * kernel.lanes * kernel.vectors;
  const int64_t width = std::min<int64_t>(kernel.lanes * kernel.vectors, padded_outputs(kernel, conv.cout) - first);
  To* to = reinterpret_cast<To*>(const_cast<char*>(conv.weights)) + first * 9 * conv.cin;
  const int64_t vectors = conv.abreast ? 1 : 3;  // of a tap row of one channel
  const int64_t tap = (conv.abreast ? conv.cout : width) * kUnit, tap_row = vectors * conv.cin * width;  // strides in the packed weights
  for (int64_t c = begin; c < end; ++c) {
    To* column = to + c / kUnit * vectors * width * kUnit + c % kUnit;
    const bool inside = c < channel + channels;
    for (int64_t i = 0; conv.abreast && i < 3 * width; ++i) column[i / width * tap_row + i % width * kUnit] = To(0.f);
    for (int64_t i = 0; i < (conv.abreast ? conv.cout : width); ++i, column += kUnit) {
      if (!inside || first + i >= conv.cout) {
        for (int64_t t = 0; t < 9; ++t) column[t / 3 * tap_row + t % 3 * tap] = To(0.f);
        continue;
      }
      const int64_t o = source_channel(first + i, conv.cout, r);
      const From* from = static_cast<const From*>(weight.data) + o * weight.o + (c - channel) * weight.c;
      for (int64_t y = 0; y < 3; ++y) {
        for (int64_t x = 0; x < 3; ++x) column[y * tap_row + x * tap] = static_cast<To>(static_cast<Via>(from[y * weight.h + x * weight.w]));
      }
    }
  }
}

}  // namespace

Element element_of(torch::headeronly::ScalarType type, const char* op) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": dtype ", torch::headeronly::toString(type), "; expected float32, bfloat16 or float16");
  return Element::f32;
}

const Kernel& choose_kernel([[maybe_unused]] Element dtype) {
#if defined(__x86_64__)
  const Isa best = isa();
  if (dtype == Element::bf16 && best >= Isa::amx) return amx::bfloat16;
  if (dtype == Element::bf16 && best >= Isa::avx512_bf16) return avx512_bf16::bfloat16;
  if (best >= Isa::avx512) return avx512::float32;
  if (best >= Isa::avx2) return avx2::float32;
#endif
  return portable::float32;
}

void* Buffer::reserve(int64_t bytes) {
  if (bytes > bytes_) {
    bytes_ = 0;
    const int64_t rounded = round_up(bytes, 64);
    memory_.reset(std::aligned_alloc(64, rounded));
    STD_TORCH_CHECK(memory_, "fastsr: cannot allocate ", rounded, " bytes of scratch memory");
    bytes_ = rounded;
  }
  return memory_.get();
}

int64_t packed_bytes(const Kernel& kernel, int64_t cout, int64_t cin) {
  const int64_t outputs = padded_outputs(kernel, cout), inputs = round_up(cin, kernel.unit);
  return round_up(packed_values(kernel, cout, inputs) * bytes_of(kernel.operand), 64) + round_up(outputs * 4, 64) + round_up(inputs * 4, 64);
}

PackedConv packed_conv(const Kernel& kernel, int64_t cout, int64_t cin, void* storage) {
  const int64_t outputs = padded_outputs(kernel, cout), inputs = round_up(cin, kernel.unit);
  PackedConv conv;
  conv.cin = inputs, conv.cout = cout, conv.abreast = cout <= kernel.few;
  char* p = static_cast<char*>(storage);
  conv.weights = p;
  p += round_up(packed_values(kernel, cout, inputs) * bytes_of(kernel.operand), 64);
  conv.bias = reinterpret_cast<float*>(p);
  p += round_up(outputs * 4, 64);
  conv.zeros = p;
  std::memset(p, 0, inputs * 4);
  return conv;
}

void pack_weights(const Kernel& kernel, const PackedConv& conv, const WeightView& weight, int64_t channel, int64_t channels,
                  int64_t pixel_shuffle) {
  constexpr int64_t kChannels = 16;  // of one task
  const int64_t group_size = kernel.lanes * kernel.vectors, groups = (conv.cout + group_size - 1) / group_size;
  const int64_t end = round_up(channel + channels, kernel.unit);
  const int64_t blocks = (end - channel + kChannels - 1) / kChannels;
  torch::stable::parallel_for(0, groups * blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = channel + task % blocks * kChannels, stop = std::min(begin + kChannels, end);
      const auto run = [&]<class From, class Via, class To>(From, Via, To) {
        pack_block<From, Via, To>(kernel, conv, weight, task / blocks, channel, channels, begin, stop, pixel_shuffle);
      };
      const auto from = [&](auto via, auto to) { weight.type == Element::f32 ? run(float(), via, to) : run(via, via, to); };
      if (kernel.operand == Element::bf16) {
        from(BFloat16(), BFloat16());
      } else if (weight.rounded_to == Element::f32) {
        run(float(), float(), float());
      } else if (weight.rounded_to == Element::bf16) {
        from(BFloat16(), float());
      } else {
        from(Half(), float());
      }
    }
  });
}

void pack_bias(const Kernel& kernel, const PackedConv& conv, const void* bias, Element type, int64_t stride, Element rounded_to,
               int64_t pixel_shuffle) {
  float* to = const_cast<float*>(conv.bias);
  const int64_t padded = padded_outputs(kernel, conv.cout);
  for (int64_t i = 0; i < padded; ++i) {
    const bool present = bias && i < conv.cout;
    to[i] = present ? rounded(to_float(bias, type, source_channel(i, conv.cout, pixel_shuffle) * stride), rounded_to) : 0.f;
  }
}

RowInput::RowInput(const Kernel& kernel, const Layout& layout, int64_t rows, Buffer& buffer)
    : kernel_(kernel), in_(layout), slot_count_(rows + 2) {
  padded_ = round_up(in_.channels, kernel.unit);
  width_ = in_.width * in_.upsample;
  type_bytes_ = bytes_of(in_.type), operand_bytes_ = bytes_of(kernel.operand);
  converted_ = in_.scale || in_.type != kernel.operand || in_.upsample != 1 || padded_ != in_.channels || (kernel.gather && width_ < kEdge);
  edges_ = kernel.gather && !converted_;
  int64_t pixels = 0;  // of a slot: a whole row, or the two ends of one
  if (converted_) pixels = kernel.gather ? std::max(width_, kEdge) + 2 : width_;
  if (edges_) pixels = 2 * kEdge;
  const int64_t slot = round_up(pixels * (edges_ ? in_.w : padded_) * operand_bytes_, 64);
  char* memory = slot ? static_cast<char*>(buffer.reserve(slot_count_ * slot)) : nullptr;
  for (int64_t i = 0; i < slot_count_; ++i) slots_[i] = memory ? memory + i * slot : nullptr;
  forget();
}

void RowInput::forget() { std::fill(keys_, keys_ + kRows + 2, -1); }

const char* RowInput::stored(int64_t n, int64_t y) const {
  return static_cast<const char*>(in_.data) + (n * in_.n + y % in_.rows * in_.h) * type_bytes_;
}

void RowInput::convert(char* to, const char* from, int64_t n) const {
  const auto read = kernel_.read[static_cast<int>(in_.type)];
  const int64_t pixel = padded_ * operand_bytes_, values = in_.channels * operand_bytes_;
  if (kernel_.gather) {
    std::memset(to, 0, pixel);
    std::memset(to + (width_ + 1) * pixel, 0, (std::max(width_, kEdge) + 1 - width_) * pixel);
    to += pixel;
  }
  if (in_.scale) {
    for (int64_t x = 0; padded_ != in_.channels && x < width_; ++x) std::memset(to + x * pixel + values, 0, pixel - values);
    const int64_t c = n * in_.channels;
    const auto scale_row = choose_channel_kernel().scale_row[static_cast<int>(in_.type)][static_cast<int>(kernel_.operand)];
    return scale_row(from, in_.w, in_.scale + c, in_.shift + c, width_, in_.channels, to, padded_);
  }
  if (in_.upsample == 1 && padded_ == in_.channels && in_.w == in_.channels) return read(from, to, in_.width * in_.channels);
  for (int64_t x = 0; x < in_.width; ++x, from += in_.w * type_bytes_) {
    read(from, to, in_.channels);
    std::memset(to + values, 0, pixel - values);
    to += pixel;
    for (int copy = 1; copy < in_.upsample; ++copy, to += pixel) std::memcpy(to, to - pixel, pixel);
  }
}

void RowInput::copy_edges(char* to, const char* from, bool left, bool right) const {
  const int64_t stride = in_.w * type_bytes_, pixel = in_.channels * type_bytes_;
  if (left) {
    std::memset(to, 0, pixel);
    kernel_.gather(from, stride, to + stride, pixel, kEdge - 1);
  }
  if (right) {
    to += kEdge * stride;
    kernel_.gather(from + (width_ + 1 - kEdge) * stride, stride, to, pixel, kEdge - 1);
    std::memset(to + (kEdge - 1) * stride, 0, pixel);
  }
}

void RowInput::set(RowJob& job, int64_t n, int64_t y) {
  job.width = width_;
  job.x_pixel = converted_ ? padded_ : in_.w;
  job.ahead = converted_ || y + 2 >= in_.height ? nullptr : stored(n, y + 2);
  job.ahead_pixel = in_.w;
  const bool left = edges_ && job.begin == 0, right = edges_ && job.end == width_;
  for (int dy = 0; dy < 3; ++dy) {
    const int64_t row = y + dy - 1;
    job.x[dy] = job.left[dy] = job.right[dy] = nullptr;
    if (row < 0 || row >= in_.height * in_.upsample) continue;
    const int64_t source = row / in_.upsample, key = n * in_.height + source;
    const char* from = stored(n, source);
    const int64_t at = source % slot_count_;
    char* slot = slots_[at];
    if ((converted_ || left || right) && keys_[at] != key) {
      converted_ ? convert(slot, from, n) : copy_edges(slot, from, left, right);
      keys_[at] = key;
    }
    const int64_t border = kernel_.gather ? padded_ * operand_bytes_ : 0;
    job.x[dy] = converted_ ? slot + border : from;
    if (left) job.left[dy] = slot;
    if (right) job.right[dy] = slot + kEdge * in_.w * operand_bytes_;
  }
}

}  // namespace fastsr::cpu
