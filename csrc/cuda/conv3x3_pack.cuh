// Weights in the order that the convolution's engine reads them, zeros behind the last channel and column:
//
//     mma.sync, fused multiply-adds   [chunk][tap][column][kChunk]
//     wgmma                           [64 / groups columns][chunk of 64 bytes][unit of 16 bytes][row of hopper/conv_layout.cuh][unit]
//
// The input channels of one convolution may come from several weights side by side (a dense block's data gradient), and a launch
// packs several convolutions: a thread per packed element, a range of blocks per part. Under autocast this is where float32 weights
// are rounded, and so are biases and other vectors that kernels read in the element type: they are parts too, copied as they lie.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/conv3x3_engine.cuh"
#include "cuda/hopper/conv_layout.cuh"
#include "cuda/parameter.cuh"

namespace fastsr::cuda {

// The weights' four strides, in elements: any layout serves; flipped and transposed weights are a view with other strides.
struct WeightStrides {
  int64_t out, in, row, column;
};

// How the product's tile wants its columns: how many, and who holds them (channel_of_column).
struct PackedLayout {
  int columns, group, pair;
  int stacked;  // wgmma's groups of outputs, or 0

  __host__ __device__ hopper::FilterStack stack() const { return {stacked}; }
  __host__ __device__ int row_bytes() const { return stacked ? hopper::kStageBytes : kRowBytes; }  // of one chunk
  // Of all columns and taps.
  __host__ __device__ int rows() const { return stacked ? columns / stack().outputs() * stack().rows() : kTaps * columns; }
  template <class T>
  int padded(int cin) const {
    const int chunk = row_bytes() / static_cast<int>(sizeof(T));
    return (cin + chunk - 1) / chunk * chunk;
  }
  template <class T>
  int64_t size(int cin) const {
    return static_cast<int64_t>(padded<T>(cin)) * rows();
  }
};

// A range of one convolution's input channels; or, without columns, `span` values with the stride `out`.
template <class T>
struct PackPart {
  Parameter<T> weight;    // at output 0, tap (0, 0) and the range's first input channel
  WeightStrides strides;
  int64_t offset;         // of the convolution in the buffer
  PackedLayout layout;
  int cin;                // of the convolution
  int channel, channels;  // where the range begins, and how many channels have weights
  int span;               // to the next range or to the end of the last chunk; those behind `channels` are zeros
  int cout, pixel_shuffle;
  int first_block;        // set by pack_weights
};

constexpr int kPackParts = 16;  // of a launch: 1.6 KB of parameters
constexpr int kPackThreads = 256;

template <class T>
struct PackParts {
  PackPart<T> parts[kPackParts];
  int count;
};

template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_conv_weights(const __grid_constant__ PackParts<T> all, T* packed) {
  int number = 0;
  while (number + 1 < all.count && static_cast<int>(blockIdx.x) >= all.parts[number + 1].first_block) ++number;
  const PackPart<T>& part = all.parts[number];
  const PackedLayout& layout = part.layout;
  const int64_t index = static_cast<int64_t>(blockIdx.x - part.first_block) * kPackThreads + threadIdx.x;
  if (layout.columns == 0) {
    if (index < part.span) packed[part.offset + index] = part.weight[index * part.strides.out];
    return;
  }
  if (index >= static_cast<int64_t>(part.span) * layout.rows()) return;
  const int within = static_cast<int>(index % part.span), channel = part.channel + within;  // channels fastest: whole runs are written
  const int row = static_cast<int>(index / part.span);
  int kh, kw, out;  // what the row holds
  int64_t place;
  if (layout.stacked) {
    constexpr int kChannels = hopper::kStageBytes / sizeof(T), kUnit = hopper::kUnitBytes / sizeof(T);
    const hopper::FilterStack stack = layout.stack();
    const int block = row / stack.rows(), row_of_block = row % stack.rows();
    const auto at = stack.at(row_of_block);
    kh = at.kh, kw = at.kw, out = block * stack.outputs() + at.output;
    const int64_t chunk = static_cast<int64_t>(block) * ((part.cin + kChannels - 1) / kChannels) + channel / kChannels;
    place = ((chunk * hopper::kStageUnits + channel % kChannels / kUnit) * stack.rows() + row_of_block) * kUnit + channel % kUnit;
  } else {
    const int tap = row / layout.columns, column = row % layout.columns;
    kh = tap / 3, kw = tap % 3, out = channel_of_column(column, layout.group, layout.pair);
    place = (static_cast<int64_t>(channel / kChunk<T>) * layout.rows() + row) * kChunk<T> + channel % kChunk<T>;
  }
  T value = from_float<T>(0.0f);
  if (within < part.channels && kh < 3 && out < part.cout) {
    const int64_t filter = shuffled_source(out, part.cout, part.pixel_shuffle) * part.strides.out + within * part.strides.in;
    value = part.weight[filter + kh * part.strides.row + kw * part.strides.column];
  }
  packed[part.offset + place] = value;
}

// A vector copied to `offset`.
template <class T>
PackPart<T> copied(const Parameter<T>& values, int64_t stride, int count, int64_t offset) {
  return {values, {stride, 0, 0, 0}, offset, {0, 0, 0, 0}, 0, 0, 0, count, 0, 1, 0};
}

// Packs all parts into `packed`, kPackParts in a launch.
template <class T, class Launch>
void pack_weights(const Launch& launch, const std::vector<PackPart<T>>& parts, T* packed) {
  for (size_t first = 0; first < parts.size(); first += kPackParts) {
    PackParts<T> some{};
    some.count = static_cast<int>(std::min<size_t>(kPackParts, parts.size() - first));
    int64_t blocks = 0;
    for (int i = 0; i < some.count; ++i) {
      PackPart<T>& part = some.parts[i] = parts[first + i];
      part.first_block = static_cast<int>(blocks);
      const int64_t threads = static_cast<int64_t>(part.span) * (part.layout.columns ? part.layout.rows() : 1);
      blocks += (threads + kPackThreads - 1) / kPackThreads;
    }
    launch(pack_conv_weights<T>, blocks, kPackThreads, 0, some, packed);
  }
}

}  // namespace fastsr::cuda
