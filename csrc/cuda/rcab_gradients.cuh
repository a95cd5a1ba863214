// What the backward of the residual channel attention block makes of the weight gradients of single images: the gate's gradient, and
// with its outcome the second convolution's.
//
//     partial sums of wgrad.cuh [image][split][tile] --image_gradients--> G[image][output][tap, input], ds = <G, weight2> + ...
//     G, T, gate and shifts of all images            --join_images------> dweight2, dbias2
//
// image_gradients: a block an image and output; join_images: a thread an element, over the images in their order. <G, weight2> is added
// in float64, since its terms cancel.
//
// Moves      per image the partial sums once, G twice: 9 M F * 4 bytes each, 147 KB at 64 channels, from L2
// Limit      L2; 16 images, 8 splits: 19 MB + 5 MB, H100: 0.01 ms predicted / not measured yet
#pragma once

#include "cuda/parameter.cuh"
#include "cuda/wgrad.cuh"

namespace fastsr::cuda {

constexpr int kImageThreads = 128;

// `all` holds one convolution and a group for every image; `weight` and `bias` are contiguous, bias may be null.
template <class T>
__global__ void __launch_bounds__(kImageThreads)
    image_gradients(const __grid_constant__ Wgrad<T> all, Parameter<T> weight, Parameter<T> bias, float scale, float* gradients,
                    float* grad_sums, float* ds) {
  __shared__ double parts[kImageThreads / 32];
  const WgradConv<T>& conv = all.convs[0];
  const int output = static_cast<int>(blockIdx.x % conv.cout), length = conv.cin * kTaps;
  const int64_t image = blockIdx.x / conv.cout;
  const float* partial = all.partials + (image * all.splits * all.tiles + output / kWgradSide * conv.across()) * kWgradPartial;
  const int64_t split_step = static_cast<int64_t>(all.tiles) * kWgradPartial;
  const auto add_splits = [&](const float* first) {
    float sum = 0.0f;
#pragma unroll 4
    for (int split = 0; split < all.splits; ++split) sum += first[split * split_step];
    return sum;
  };
  double product = 0.0;
  for (int index = threadIdx.x; index < length; index += kImageThreads) {
    const int tap = index / conv.cin, input = index % conv.cin;
    const int place = (tap * kWgradSide + output % kWgradSide) * kWgradSide + input % kWgradSide;
    const float sum = add_splits(partial + input / kWgradSide * kWgradPartial + place);
    gradients[static_cast<int64_t>(blockIdx.x) * length + index] = sum;
    product += static_cast<double>(sum) * to_float(weight[static_cast<int64_t>(output) * length + input * kTaps + tap]);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) product += __shfl_xor_sync(0xffffffffu, product, lanes);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = product;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kImageThreads / 32; ++i) product += parts[i];
  const float of_grad = add_splits(partial + kWgradSums + output % kWgradSide);
  if (bias.data) product += static_cast<double>(to_float(bias[output])) * of_grad;
  grad_sums[blockIdx.x] = of_grad;
  ds[blockIdx.x] = static_cast<float>(scale * product);
}

// The vectors of the images that a launch takes, [image][output] each, but [image][input][tap] for the sums of taps.
struct ImageVectors {
  const float *gradients, *grad_sums, *tap_sums, *gates, *shifts;
};

// total[output][9 M + 1] (+)= the sum over images of scale * gates * G + shifts * T, and of what makes the bias's gradient behind it;
// with the last images also dweight2 and dbias2, of type W.
template <class W>
__global__ void __launch_bounds__(kReduceThreads)
    join_images(ImageVectors v, int64_t images, int outputs, int inputs, float scale, float pixels, bool first, float* total, W* dweight, W* dbias) {
  const int length = inputs * kTaps;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (index >= static_cast<int64_t>(outputs) * (length + 1)) return;
  const int output = static_cast<int>(index / (length + 1)), place = static_cast<int>(index % (length + 1));
  const bool is_bias = place == length;
  const int tap = place / inputs, input = place % inputs;
  float sum = first ? 0.0f : total[index];
#pragma unroll 4
  for (int64_t image = 0; image < images; ++image) {
    const int64_t row = image * outputs + output;
    const float gradient = is_bias ? v.grad_sums[row] : v.gradients[row * length + place];
    const float seen = is_bias ? pixels : v.tap_sums[image * length + input * kTaps + tap];
    sum += scale * v.gates[row] * gradient + v.shifts[row] * seen;
  }
  total[index] = sum;
  if (!dweight) return;
  W* target = is_bias ? dbias + output : dweight + static_cast<int64_t>(output) * length + input * kTaps + tap;
  *target = from_float<W>(sum);
}

}  // namespace fastsr::cuda
