// The residual dense block and its backward: a chain of 3x3 convolutions (conv3x3.cuh) over one workspace, then weight gradients.
//
//     workspace pixel       [ x 64 | a1 32 | a2 32 | a3 32 | a4 32 ]      a launch per convolution: it reads the prefix and
//       conv 1 reads          ------>                                     writes the next slice; the last one writes y with
//       conv 2 reads          ------------->            ...               both skips. No concatenation, no copy of x where it
//       conv 5 reads          ----------------------------------->        already lies in the workspace.
//
//     gradients' pixel      [ g5 64 | g4 32 | g3 32 | g2 32 | g1 32 ]     the same chain backwards: the slice g_k is the convolution
//                                                                         of [g5 ... g_(k+1)] with the flipped weights of all later
//                                                                         convolutions, times LeakyReLU' by the sign of a_k
//
// Launches   forward 1 packing + 5 convolutions (+ 1 copy of x); backward 1 scaling + 1 packing + 5 convolutions + 2 (wgrad.cuh)
// Moves      forward, bf16: reads 64 + 96 + 128 + 160 + 192 values (27% more for halos) + 64 of skip, writes 4 x 32 + 64: 2.1 KB a
//            pixel, half of it or more from L2 (a workspace of 16x48x48 is 14 MB); 479,232 FLOP a pixel; the backward's chain the
//            same and 128 values of masks. float32 twice the bytes
// Limit      224 FLOP a byte, and an H100 balances at 266 from DRAM alone: bound by mma.sync's rate, about 60% of 798 TFLOP/s, where
//            there are blocks enough: 16x48x48 has 144 tiles of 16 x 16 for 132 multiprocessors, 256x256 has 256; launches 0.02 ms.
//            float32: bound by fused multiply-adds
//
// predicted / measured, H100, one block of 64 features and 4 x 32 growths:
//   16x64x48x48    17.7 GFLOP   bf16, 0.022 ms at 798 TFLOP/s   forward 0.08 ms / not measured yet   backward 0.15 ms / not measured yet
//                               float32, 0.26 ms at 67 TFLOP/s  forward 0.45 ms / not measured yet   backward 0.95 ms / not measured yet
//   1x64x256x256   31.4 GFLOP   bf16, 0.039 ms                  forward 0.11 ms / not measured yet   backward 0.21 ms / not measured yet
//                               float32, 0.47 ms                forward 0.75 ms / not measured yet   backward 1.6 ms / not measured yet
#pragma once

#include <utility>
#include <vector>

#include "cuda/conv3x3.cuh"
#include "cuda/scale_channels.cuh"
#include "cuda/wgrad.cuh"

namespace fastsr::cuda {

template <class T>
struct DenseConv {
  Parameter<T> weight;
  WeightStrides weight_strides;
  Parameter<T> bias;  // may be null; the backward does not look at it
  int64_t bias_stride;
  int begin, outputs;  // it reads the workspace's first `begin` channels and adds `outputs`
};

template <class T>
struct DenseBlock {
  int64_t batch;
  int height, width;
  float negative_slope;
  std::vector<DenseConv<T>> convs;
  bool wide() const { return !convs.empty() && convs.front().weight.wide; }
};

// Convolutions over prefixes of one buffer, each writing what a later one reads.
template <class Products, class T, class Launch>
class DenseChain {
 public:
  DenseChain(const Launch& launch, const DenseBlock<T>& block, ImageView<T> buffer) : launch_(launch), block_(block), buffer_(buffer) {}

  void fill(ImageView<const T> from, int channels, float factor) const {
    if (from.data == buffer_.data) return;
    scale_channels(launch_, from, buffer_, block_.batch, block_.height, block_.width, channels, {factor, nullptr, nullptr});
  }

  // The next convolution: `inputs` -> `outputs` channels. The caller says where its result goes, and adds weights for all inputs.
  Conv3x3Call<T>& add(int inputs, int outputs) {
    bias_offsets_.push_back(-1);
    Conv3x3Call<T> call{};
    call.x = {buffer_.data, buffer_.strides};
    call.stacked = stacked_outputs<T>(launch_, call.x, inputs, outputs);
    offsets_.push_back(packed_size_);
    packed_size_ += layout_of(outputs, call.stacked).template size<T>(inputs);
    call.batch = block_.batch, call.height = block_.height, call.width = block_.width;
    call.cin = inputs, call.cout = outputs;
    call.upsample = call.pixel_shuffle = 1;
    call.negative_slope = call.scale = call.scale2 = 1.0f;
    return calls_.emplace_back(call);
  }

  // Weights of the latest convolution for its input channels from `first` on.
  void add_weights(const Parameter<T>& weight, const WeightStrides& strides, int first, int channels) {
    const Conv3x3Call<T>& call = calls_.back();
    const PackedLayout layout = layout_of(call.cout, call.stacked);
    const int end = first + channels;
    parts_.push_back({weight, strides, offsets_.back(), layout, call.cin, first, channels,
                      (end == call.cin ? layout.template padded<T>(end) : end) - first, call.cout, 1, 0});
  }

  // The latest convolution's bias.
  void add_bias(const DenseConv<T>& conv) {
    Conv3x3Call<T>& call = calls_.back();
    call.bias = static_cast<const T*>(conv.bias.data), call.bias_stride = conv.bias_stride;
    if (!conv.bias.data || !conv.bias.wide) return;
    bias_offsets_.back() = packed_size_;
    parts_.push_back(copied(conv.bias, conv.bias_stride, call.cout, packed_size_));
    packed_size_ += (call.cout + kChunk<T> - 1) / kChunk<T> * kChunk<T>;  // weights begin at 16 bytes
  }

  // allocate as for weight_gradients.
  template <class Allocate>
  void run(const Allocate& allocate) {
    T* packed = static_cast<T*>(allocate(packed_size_ * static_cast<int64_t>(sizeof(T))));
    pack_weights(launch_, parts_, packed);
    for (size_t k = 0; k < calls_.size(); ++k) {
      calls_[k].packed = packed + offsets_[k];
      if (bias_offsets_[k] >= 0) calls_[k].bias = packed + bias_offsets_[k], calls_[k].bias_stride = 1;
      convolve<Products>(launch_, std::as_const(calls_[k]));
    }
  }

 private:
  static PackedLayout layout_of(int outputs, int stacked) { return packed_layout<Products>(outputs, stacked); }

  const Launch& launch_;
  const DenseBlock<T>& block_;
  ImageView<T> buffer_;
  std::vector<Conv3x3Call<T>> calls_;
  std::vector<int64_t> offsets_, bias_offsets_;  // of their packed weights and biases; -1 for a bias that is read where it lies
  std::vector<PackPart<T>> parts_;
  int64_t packed_size_ = 0;
};

template <class T>
ImageView<T> from_channel(ImageView<T> view, int channel) {
  return {view.data + channel, view.strides};
}

// Step 1 of the operator: one stage per convolution, each writing its slice of the workspace.
template <class Products, class T, class Launch>
void add_growths(DenseChain<Products, T, Launch>& chain, const DenseBlock<T>& block, ImageView<T> workspace, size_t count) {
  for (size_t k = 0; k < count; ++k) {
    const DenseConv<T>& conv = block.convs[k];
    Conv3x3Call<T>& call = chain.add(conv.begin, conv.outputs);
    call.out = from_channel(workspace, conv.begin);
    call.negative_slope = block.negative_slope;
    chain.add_bias(conv);
    chain.add_weights(conv.weight, conv.weight_strides, 0, conv.begin);
  }
}

// The workspace alone: all of block.convs write slices of it.
template <class Products, class T, class Launch, class Allocate>
void block_features(const Launch& launch, const Allocate& allocate, const DenseBlock<T>& block, ImageView<const T> x, int features,
                          ImageView<T> workspace) {
  DenseChain<Products, T, Launch> chain(launch, block, workspace);
  chain.fill(x, features, 1.0f);
  add_growths(chain, block, workspace, block.convs.size());
  chain.run(allocate);
}

// Steps 1 to 3: the last of block.convs writes `out`; residual.data may be null, and then residual_scale is 1.
template <class Products, class T, class Launch, class Allocate>
void block_forward(const Launch& launch, const Allocate& allocate, const DenseBlock<T>& block, ImageView<const T> x,
                         ImageView<const T> residual, ImageView<T> workspace, ImageView<T> out, float res_scale, float residual_scale) {
  DenseChain<Products, T, Launch> chain(launch, block, workspace);
  const DenseConv<T>& last = block.convs.back();
  chain.fill(x, last.outputs, 1.0f);
  add_growths(chain, block, workspace, block.convs.size() - 1);
  Conv3x3Call<T>& call = chain.add(last.begin, last.outputs);
  chain.add_bias(last);
  call.skip = {workspace.data, workspace.strides}, call.skip2 = residual;
  call.out = out;
  call.scale = res_scale, call.scale2 = residual_scale;
  chain.add_weights(last.weight, last.weight_strides, 0, last.begin);
  chain.run(allocate);
}

// Steps 4 to 7. All is linear in grad: residual_scale comes in at the end. dx.data may be null; `gradients` holds dweight and dbias
// of every convolution, in the weights' type, or nothing.
template <class Products, class T, class Launch, class Allocate>
void block_backward(const Launch& launch, const Allocate& allocate, const DenseBlock<T>& block, ImageView<const T> grad,
                          ImageView<const T> workspace, ImageView<T> grad_workspace, ImageView<T> dx,
                          const std::vector<std::pair<void*, void*>>& gradients, float res_scale, float residual_scale) {
  const int count = static_cast<int>(block.convs.size());
  std::vector<int> first(count + 1, 0);  // channel of each convolution's gradient; they lie last to first
  for (int k = count - 1, channel = 0; k >= 0; --k) first[k] = channel, channel += block.convs[k].outputs;

  DenseChain<Products, T, Launch> chain(launch, block, grad_workspace);
  chain.fill(grad, block.convs.back().outputs, res_scale);
  for (int k = count - 1; k >= (dx.data ? 0 : 1); --k) {
    // The gradient of what convolution k - 1 wrote (for k = 0: of x), from those of convolutions k and later.
    const int begin = k ? block.convs[k - 1].begin : 0, outputs = k ? block.convs[k - 1].outputs : block.convs[0].begin;
    Conv3x3Call<T>& call = chain.add(first[k] + block.convs[k].outputs, outputs);
    for (int later = count - 1; later >= k; --later) {
      const DenseConv<T>& conv = block.convs[later];
      const WeightStrides& s = conv.weight_strides;
      chain.add_weights(conv.weight.from(begin * s.in + 2 * s.row + 2 * s.column), {s.in, s.out, -s.row, -s.column}, first[later],
                        conv.outputs);
    }
    if (k) {
      call.mask = from_channel(workspace, begin), call.negative_slope = block.negative_slope;
      call.out = from_channel(grad_workspace, first[k - 1]);
    } else {
      call.skip = grad, call.scale2 = residual_scale;
      call.out = dx;
    }
  }
  chain.run(allocate);

  std::vector<WgradConv<T>> convs;
  for (int k = 0; k < static_cast<int>(gradients.size()); ++k) {
    const auto& [dweight, dbias] = gradients[k];
    convs.push_back({grad_workspace.data + first[k], dweight, dbias, block.convs[k].begin, block.convs[k].outputs, false, 0});
  }
  weight_gradients<Products, T>(launch, allocate, workspace, grad_workspace.strides, block.batch, block.height, block.width, residual_scale, convs,
                                block.wide());
}

}  // namespace fastsr::cuda
