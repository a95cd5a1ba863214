// What an operator needs around the engine of conv_engine.h: the choice of kernel, packing, and the input's rows.
#pragma once
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "cpu/conv_engine.h"

namespace fastsr::cpu {

// The dtype of an op's tensors; throws for one that has no kernel.
Element element_of(torch::headeronly::ScalarType type, const char* op);

// The kernel for tensors of this dtype on the instruction set in use.
const Kernel& choose_kernel(Element dtype);

// Rows handed to a kernel at a time: narrow ones in numbers, so that the AMX kernel can run one row's epilogue beside the next row's
// products.
constexpr int64_t kRows = 8;
inline int64_t rows_at_a_time(int64_t width) {
  const int64_t rows = 192 / width;
  return rows < 1 ? 1 : rows > kRows ? kRows : rows;
}

// Memory that grows and is kept; its start is aligned to a cache line.
class Buffer {
 public:
  void* reserve(int64_t bytes);

 private:
  std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, &std::free};
  int64_t bytes_ = 0;
};

// A weight tensor (O, C, 3, 3) by its strides in elements. A backward pass swaps those of o and c, and flips the taps by
// negative strides of h and w from the last tap on.
struct WeightView {
  const void* data;
  Element type;
  int64_t o, c, h, w;
  Element rounded_to;  // float32 values are first rounded to it: the type of the pictures
};

// Bytes of a packed convolution, and its parts laid out in such a buffer (64-byte aligned). Filled by
// `pack_weights` and `pack_bias`.
int64_t packed_bytes(const Kernel& kernel, int64_t cout, int64_t cin);
PackedConv packed_conv(const Kernel& kernel, int64_t cout, int64_t cin, void* storage);

// Fill input channels [channel, channel + channels) from `weight`, and with zeros up to the next multiple of the kernel's unit
// (so parts are packed in ascending order). With pixel_shuffle r, output channel o * r^2 + s is put at s * (cout / r^2) + o, so
// that the channels of a pixel lie side by side. Runs on torch's threads.
void pack_weights(const Kernel& kernel, const PackedConv& conv, const WeightView& weight, int64_t channel, int64_t channels,
                  int64_t pixel_shuffle = 1);
void pack_bias(const Kernel& kernel, const PackedConv& conv, const void* bias, Element type, int64_t stride, Element rounded_to,
               int64_t pixel_shuffle = 1);

// The rows of an input as a kernel wants them. Where dtype, upsampling or padding of channels forbid reading them in place,
// the last rows are kept converted; one object per thread and convolution.
class RowInput {
 public:
  struct Layout {
    const void* data;
    Element type;
    int64_t n, h, w;  // strides in elements
    int64_t channels, height, width;  // of the stored picture
    int upsample;
    int64_t rows = INT64_MAX;  // held at a time: row y lies where y % rows says
    // Where they are not null: the values are read as scale[image][channel] * v + shift[image][channel], zero outside the picture.
    const float *scale = nullptr, *shift = nullptr;
  };

  // `rows`: how many consecutive rows are asked for before the kernel runs.
  RowInput(const Kernel& kernel, const Layout& layout, int64_t rows, Buffer& buffer);

  // Set the input fields of `job` for row y of image n of the (upsampled) picture. Its begin and end are read, and are the same from call
  // to call.
  void set(RowJob& job, int64_t n, int64_t y);

  // True if rows are read where they lie, so that a part of one is enough for a job on fewer columns.
  bool in_place() const { return !converted_; }

  // Forget converted rows, after the input's values have changed.
  void forget();

 private:
  const char* stored(int64_t n, int64_t y) const;
  void convert(char* to, const char* from, int64_t n) const;
  void copy_edges(char* to, const char* from, bool left, bool right) const;

  const Kernel& kernel_;
  Layout in_;
  int64_t padded_, width_;         // channels, and pixels of a row as the kernel sees it
  int64_t type_bytes_, operand_bytes_;
  bool converted_, edges_;
  int64_t slot_count_;
  char* slots_[kRows + 2];
  int64_t keys_[kRows + 2];
};

}  // namespace fastsr::cpu
