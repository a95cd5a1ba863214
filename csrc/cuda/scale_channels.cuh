// to = factor * factors[image][channel] * from + shifts[image][channel]: a scaled copy of some channels of every pixel.
//
// A thread takes 16 bytes of one pixel; grid.x covers images * pixels * ceil(channels / 16 bytes). Nothing is kept on chip.
//
// Moves      2 * channels * sizeof(T) bytes a pixel, the vectors from L2
// Limit      DRAM bandwidth; 16x64x48x48 bf16, 9.4 MB, H100: 0.004 ms predicted / not measured yet
#pragma once

#include "cuda/conv3x3_engine.cuh"

namespace fastsr::cuda {

constexpr int kScaleThreads = 256;

template <class T>
__global__ void __launch_bounds__(kScaleThreads) scale_channels_kernel(ImageView<const T> from, ImageView<T> to, int64_t pixels, int height,
                                                                       int width, int channels, ChannelScaling scaling, bool vectors) {
  constexpr int kUnit = 16 / sizeof(T);
  const int units = (channels + kUnit - 1) / kUnit;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x, pixel = index / units;
  if (pixel >= pixels) return;
  const int channel = static_cast<int>(index % units) * kUnit, x = static_cast<int>(pixel % width);
  const int64_t row = pixel / width, image = row / height, vector = image * channels + channel;
  const auto scaled = [&](T value, int i) { return from_float<T>(scaling(to_float(value), vector + i)); };
  const T* source = from.at(image, row % height, x) + channel;
  T* target = to.at(image, row % height, x) + channel;
  if (vectors && channel + kUnit <= channels) {
    auto values = *reinterpret_cast<const Pack<T>*>(source);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values.v[i] = scaled(values.v[i], i);
    *reinterpret_cast<Pack<T>*>(target) = values;
  } else {
#pragma unroll 1
    for (int i = 0; i < min(kUnit, channels - channel); ++i) target[i] = scaled(source[i], i);
  }
}

template <class T, class Launch>
void scale_channels(const Launch& launch, ImageView<const T> from, ImageView<T> to, int64_t batch, int height, int width, int channels,
                    const ChannelScaling& scaling) {
  constexpr int kUnit = 16 / sizeof(T);
  const int64_t pixels = batch * height * width, units = (channels + kUnit - 1) / kUnit;
  launch(scale_channels_kernel<T>, (pixels * units + kScaleThreads - 1) / kScaleThreads, kScaleThreads, 0, from, to, pixels, height, width,
         channels, scaling, from.starts_at_16_bytes() && to.starts_at_16_bytes());
}

}  // namespace fastsr::cuda
