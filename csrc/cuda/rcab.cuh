// The residual channel attention block and its backward: two convolutions of conv3x3.cuh, and vectors of the images between them.
//
//     forward    x --conv1, ReLU--> r, and for each tile the sums of r that the nine taps of conv2 read (conv3x3_sums.cuh)
//                sums --add_tap_sums--> T --pool_hidden--> pooled --gate_images--> s              conv2 has not run yet
//                r --conv2, * res_scale * s, + x--> y
//     backward   grad, r --wgrad.cuh, a group an image--> partial sums --image_gradients--> G, ds --gate_images--> e
//                G, T --join_images--> dweight2, dbias2                                           (rcab_gradients.cuh)
//                res_scale * s * grad + e --> du --flipped conv2, masked by r > 0--> dr --flipped conv1, + grad--> dx
//                x, dr --wgrad.cuh--> dweight1, dbias1
//
// du is made of grad in shared memory, as the convolution has copied it; for wgmma, which multiplies what TMA has brought, a pass writes
// it where dx will be. Images are taken as many at a time as leave the sums of single images
// below kImageBytes.
//
// Launches   forward 6: packing, conv1, two for its sums, the gate, conv2; backward 10: packing, 2 convolutions, 4 for weights, 3 for the
//            gate (wgmma: 11)
// Lives in   as conv3x3.cuh and wgrad.cuh; vectors of 9 M + 5 F values an image in L2
// Moves      forward, a pixel: x twice, r twice, y; backward: grad 4 times, x, r twice, dr 3 times, dx; 27% more where a
//            halo is read; sums 7% of r; 19 MB of partial sums each way for each of the two weights
// Limit      147,456 FLOP a pixel at 64 channels forward, 294,912 backward; 230 FLOP a byte forward in bf16, and an H100 balances at 266
//            from DRAM alone (16x64x48x48 is 4.7 MB a picture: L2): bound by mma.sync's rate, about 60% of 798 TFLOP/s, where there
//            are blocks enough; float32: bound by fused multiply-adds
//
// predicted / measured, H100, 64 channels, squeeze 4:
//   16x64x48x48    5.4 GFLOP   bf16, 0.007 ms at 798 TFLOP/s   forward 0.035 ms / not measured yet   backward 0.09 ms / not measured yet
//                              float32, 0.08 ms at 67 TFLOP/s  forward 0.15 ms / not measured yet    backward 0.32 ms / not measured yet
//   1x64x128x128   2.4 GFLOP   bf16, 0.003 ms                  forward 0.03 ms / not measured yet    backward 0.08 ms / not measured yet
//   1x64x256x256   9.7 GFLOP   bf16, 0.012 ms                  forward 0.045 ms / not measured yet   backward 0.11 ms / not measured yet
//                              float32, 0.14 ms                forward 0.24 ms / not measured yet    backward 0.55 ms / not measured yet
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cuda/attention_gate.cuh"
#include "cuda/conv3x3_sums.cuh"
#include "cuda/rcab_gradients.cuh"
#include "cuda/scale_channels.cuh"

namespace fastsr::cuda {

constexpr int64_t kImageBytes = 1 << 28;  // of partial sums and weight gradients of single images at a time
constexpr int kPoolThreads = 256;

// A convolution of the block; bias may be null.
template <class T>
struct RcabConv {
  Parameter<T> weight;
  WeightStrides strides;
  Parameter<T> bias;
  int64_t bias_stride;
  int cin, cout;
};

template <class T>
struct RcabCall {
  int64_t batch;
  int height, width;
  RcabConv<T> first, second;  // the second's filters lie end to end, its bias is contiguous
  GateCall<T> gate;           // where the parameters are wide, without them:
  Parameter<T> gate_parameters[4];  // down_weight, down_bias, up_weight, up_bias
  float res_scale;
  int64_t image_bytes = kImageBytes;
  int64_t pixels() const { return static_cast<int64_t>(height) * width; }
  bool wide() const { return first.weight.wide; }
};

// What the forward leaves beside the pictures.
struct RcabVectors {
  float *tap_sums, *pooled, *gates;  // [image][M][9], [image][F], [image][F]
};

// pooled[image][output] = bias + the mean of conv2's output, from the sums that its taps read; a warp each.
template <class T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_hidden(RcabConv<T> conv, const float* tap_sums, int64_t images, float pixels, float* pooled) {
  const int lane = threadIdx.x % 32, length = conv.cin * kTaps;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kPoolThreads / 32) + threadIdx.x / 32;
  if (index >= images * conv.cout) return;  // whole warps
  const Parameter<T> filter = conv.weight.from(index % conv.cout * conv.strides.out);
  const float* sums = tap_sums + index / conv.cout * length;
  const bool taps_outside = conv.strides.in == 1;  // channels-last: memory's order is tap, input
  float sum = 0.0f;
#pragma unroll 4
  for (int i = lane; i < length; i += 32) {
    sum += to_float(filter[i]) * sums[taps_outside ? i % conv.cin * kTaps + i / conv.cin : i];
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (lane == 0) pooled[index] = sum / pixels + (conv.bias.data ? to_float(conv.bias[index % conv.cout]) : 0.0f);
}

// The launches of one call. launch and allocate as for weight_gradients.
template <class Products, class T, class Launch, class Allocate>
class Rcab {
 public:
  Rcab(const Launch& launch, const Allocate& allocate, const RcabCall<T>& call) : launch_(launch), allocate_(allocate), b_(call) {}

  // Steps 1 to 5 of the operator.
  void forward(ImageView<const T> x, ImageView<T> hidden, const RcabVectors& v, ImageView<T> out) const {
    Packed parameters = packed(b_.first, x, b_.second, constant(hidden));
    Conv3x3Call<T>&first = parameters.one, &second = parameters.other;
    first.out = hidden, first.negative_slope = 0.0f;
    convolve_and_sum<Products>(launch_, allocate_, first, v.tap_sums);

    const int64_t warps = b_.batch * b_.second.cout, per_block = kPoolThreads / 32;
    launch_(pool_hidden<T>, (warps + per_block - 1) / per_block, kPoolThreads, 0, b_.second, v.tap_sums, b_.batch,
            static_cast<float>(b_.pixels()), v.pooled);
    GateVectors gate{};
    gate.pooled = v.pooled, gate.gates = v.gates, gate.z = floats(b_.batch * b_.gate.squeezed);
    launch_(gate_images<T, false>, b_.batch, kGateThreads, 0, parameters.gate, v.pooled, 1, 1.0f, 1.0f, gate);

    second.skip = x, second.out = out;
    second.scale = b_.res_scale, second.factors = v.gates;
    convolve<Products>(launch_, std::as_const(second));
  }

  // Steps 6 to 9. dx.data may be null; `gradients` are those of the eight parameters, or null.
  void backward(ImageView<const T> grad, ImageView<const T> x, ImageView<const T> hidden, const RcabVectors& v, ImageView<T> grad_hidden,
                ImageView<T> dx, void* const* gradients) const {
    const int features = b_.second.cout, channels = b_.second.cin;
    ImageView<T> scaled{};
    if (stacked_outputs<T>(launch_, grad, features, channels)) {  // wgmma reads x as TMA brings it
      const int64_t row = static_cast<int64_t>(b_.width) * features, size = b_.batch * b_.height * row * static_cast<int64_t>(sizeof(T));
      scaled = dx.data ? dx : ImageView<T>{static_cast<T*>(allocate_(size)), {b_.height * row, row, features}};
    }
    Packed parameters = packed(flipped(b_.second), scaled.data ? constant(scaled) : grad, flipped(b_.first), constant(grad_hidden));
    GateVectors gate{v.pooled, v.gates, floats(b_.batch * b_.gate.squeezed), floats(b_.batch * features),
                     floats(b_.batch * b_.gate.squeezed), floats(b_.batch * features)};
    gate_gradients(grad, hidden, v, parameters.gate, gate, gradients);
    const ChannelScaling scaling{b_.res_scale, v.gates, gate.shifts};
    Conv3x3Call<T>&second = parameters.one, &first = parameters.other;
    if (scaled.data) {
      scale_channels(launch_, grad, scaled, b_.batch, b_.height, b_.width, features, scaling);
    } else {
      second.scaling = scaling;
    }

    second.mask = hidden, second.negative_slope = 0.0f, second.out = grad_hidden;
    convolve<Products>(launch_, std::as_const(second));
    if (dx.data) {
      first.skip = grad, first.out = dx;
      convolve<Products>(launch_, std::as_const(first));
    }
    if (!gradients) return;
    weight_gradients<Products, T>(launch_, allocate_, x, grad_hidden.strides, b_.batch, b_.height, b_.width, 1.0f,
                                  {{grad_hidden.data, gradients[0], gradients[1], features, channels, false, 0}}, b_.wide());
    with_gradient_type<T>(b_.wide(), [&]<class W>(W) {
      const auto at = [&](int i) { return static_cast<W*>(gradients[i]); };
      const OuterProduct<W> up{gate.dv, gate.z, features, b_.gate.squeezed, at(6), at(7)};
      const OuterProduct<W> down{gate.du, v.pooled, b_.gate.squeezed, features, at(4), at(5)};
      void (*outer)(OuterProduct<W>, OuterProduct<W>, int64_t) = weight_gradients<W>;
      const int64_t elements = 2LL * features * b_.gate.squeezed;
      launch_(outer, (elements + kOuterThreads - 1) / kOuterThreads, kOuterThreads, 0, up, down, b_.batch);
    });
  }

 private:
  float* floats(int64_t count) const { return static_cast<float*>(allocate_(count * static_cast<int64_t>(sizeof(float)))); }
  static ImageView<const T> constant(ImageView<T> view) { return {view.data, view.strides}; }

  // The transposed convolution.
  static RcabConv<T> flipped(const RcabConv<T>& conv) {
    const WeightStrides& s = conv.strides;
    return {conv.weight.from(2 * s.row + 2 * s.column), {s.in, s.out, -s.row, -s.column}, {}, 0, conv.cout, conv.cin};
  }

  // Both convolutions with their inputs and weights; what they write is left to the caller. And the gate.
  struct Packed {
    Conv3x3Call<T> one, other;
    GateCall<T> gate;
  };

  // All in one launch, which also rounds what the kernels read as T where the parameters are wide.
  Packed packed(const RcabConv<T>& one, ImageView<const T> of_one, const RcabConv<T>& other, ImageView<const T> of_other) const {
    Packed all{described(one, of_one), described(other, of_other), b_.gate};
    std::vector<PackPart<T>> parts;
    int64_t size = 0;
    for (const auto& [conv, call] : {std::pair(&one, &all.one), std::pair(&other, &all.other)}) {
      const PackedLayout layout = packed_layout<Products>(conv->cout, call->stacked);
      parts.push_back({conv->weight, conv->strides, size, layout, conv->cin, 0, conv->cin, layout.template padded<T>(conv->cin), conv->cout, 1, 0});
      size += layout.template size<T>(conv->cin);
    }
    const int64_t second = parts[1].offset, f = b_.second.cout, r = b_.gate.squeezed;
    const auto& gate = b_.gate_parameters;
    struct Vector {
      Parameter<T> values;
      int64_t stride, count;
    };
    const Vector vectors[] = {{one.bias, one.bias_stride, one.cout}, {other.bias, other.bias_stride, other.cout},
                              {gate[0], 1, r * f}, {gate[1], 1, r}, {gate[2], 1, r * f}, {gate[3], 1, f}};
    int64_t offsets[6];
    for (int i = 0; i < 6; ++i) {
      offsets[i] = vectors[i].values.data && vectors[i].values.wide ? size : -1;
      if (offsets[i] < 0) continue;
      parts.push_back(copied(vectors[i].values, vectors[i].stride, static_cast<int>(vectors[i].count), size));
      size += vectors[i].count;
    }
    T* memory = static_cast<T*>(allocate_(size * static_cast<int64_t>(sizeof(T))));
    pack_weights(launch_, parts, memory);
    const auto at = [&](int i) { return offsets[i] < 0 ? static_cast<const T*>(vectors[i].values.data) : memory + offsets[i]; };
    all.one.packed = memory, all.other.packed = memory + second;
    all.one.bias = at(0), all.one.bias_stride = offsets[0] < 0 ? one.bias_stride : 1;
    all.other.bias = at(1), all.other.bias_stride = offsets[1] < 0 ? other.bias_stride : 1;
    if (b_.wide()) all.gate.down_weight = at(2), all.gate.down_bias = at(3), all.gate.up_weight = at(4), all.gate.up_bias = at(5);
    return all;
  }

  Conv3x3Call<T> described(const RcabConv<T>& conv, ImageView<const T> x) const {
    Conv3x3Call<T> call{};
    call.x = x, call.stacked = stacked_outputs<T>(launch_, x, conv.cin, conv.cout);
    call.batch = b_.batch, call.height = b_.height, call.width = b_.width;
    call.cin = conv.cin, call.cout = conv.cout;
    call.upsample = call.pixel_shuffle = 1;
    call.negative_slope = call.scale = call.scale2 = 1.0f;
    return call;
  }

  // Fills gate's dv, du, z and shifts, and unless null dweight2 and dbias2.
  void gate_gradients(ImageView<const T> grad, ImageView<const T> hidden, const RcabVectors& v, const GateCall<T>& parameters,
                      const GateVectors& gate, void* const* gradients) const {
    const int features = b_.second.cout, channels = b_.second.cin, length = channels * kTaps;
    const int64_t together = std::clamp<int64_t>(b_.image_bytes / (8LL * features * length), 1, b_.batch);
    float *of_images = floats(together * features * length), *grad_sums = floats(together * features), *ds = floats(together * features);
    float* total = gradients ? floats(static_cast<int64_t>(features) * (length + 1)) : nullptr;
    // One buffer for all partial sums: the launches follow one another.
    void* partials = nullptr;
    int64_t size = 0;
    const auto reused = [&](int64_t bytes) { return bytes <= size ? partials : partials = allocate_(size = bytes); };
    for (int64_t n = 0; n < b_.batch; n += together) {
      const int64_t images = std::min(together, b_.batch - n);
      const WgradConv<T> conv{grad.data + n * grad.strides.n, nullptr, nullptr, channels, features, false, 0};
      const Wgrad<T> sums = partial_weight_gradients<Products, T>(launch_, reused, {hidden.data + n * hidden.strides.n, hidden.strides}, grad.strides,
                                                     images, images, b_.height, b_.width, &conv, 1);
      launch_(image_gradients<T>, images * features, kImageThreads, 0, sums, b_.second.weight, b_.second.bias, b_.res_scale, of_images,
              grad_sums, ds);
      const int64_t at = n * features, squeezed = n * b_.gate.squeezed;
      const GateVectors some{gate.pooled + at, gate.gates + at, gate.z + squeezed, gate.dv + at, gate.du + squeezed, gate.shifts + at};
      launch_(gate_images<T, true>, images, kGateThreads, 0, parameters, ds, 1, 1.0f, static_cast<float>(b_.pixels()), some);
      if (!gradients) continue;
      const bool last = n + images == b_.batch;
      const int64_t elements = static_cast<int64_t>(features) * (length + 1);
      with_gradient_type<T>(b_.wide(), [&]<class W>(W) {
        const auto at = [&](int i) { return last ? static_cast<W*>(gradients[i]) : nullptr; };
        launch_(join_images<W>, (elements + kReduceThreads - 1) / kReduceThreads, kReduceThreads, 0,
                ImageVectors{of_images, grad_sums, v.tap_sums + n * length, some.gates, some.shifts}, images, features, channels,
                b_.res_scale, static_cast<float>(b_.pixels()), n == 0, total, at(2), at(3));
      });
    }
  }

  const Launch& launch_;
  const Allocate& allocate_;
  const RcabCall<T>& b_;
};

}  // namespace fastsr::cuda
