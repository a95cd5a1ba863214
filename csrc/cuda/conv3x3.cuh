// The fused 3x3 convolution: bias, activation (or the mask of its derivative), PixelShuffle, scales and skips in the epilogue;
// x read as a channel prefix, optionally enlarged by nearest neighbour; y written as a channel slice. Channels-last.
//
//   grid.x = images * ceil(H/ROWS) * ceil(W/16) * (packed columns / COLUMNS)        columns fastest
//
//        x (shared memory, 2 stages)          y (registers until the epilogue)
//      +--------- 18 ---------+
//      | . . . . halo . . . . |               +------- 16 -------+
//      | .  +---- 16 ----+  . |               | warp 0: 2 rows   |   bf16/f16, 64 columns: 8 warps x 2 rows
//      | .  |            |  . |   9 taps      | warp 1           |             32, 16:      4 warps x 4 rows
//   18 | .  |  the tile  |  . |  -------->    |  ...             |   a warp: mma.sync m16n8k16, 16 pixels x 8 columns
//      | .  |            |  . |               | warp 7           |   float32: 8 rows, 4 warps, a thread 8 pixels x 1/8 of
//      | .  +------------+  . |               +------------------+            the columns, fused multiply-adds
//      | . . . . . . . . . . .|
//      +----------------------+
//
// Lives in   shared: 32 bytes of channels of every halo pixel and of every (tap, column), two stages (cp.async: zeros outside
//            the image); registers: 64 sums a thread (float32: 128), started with the bias; global: x once per column block, y and
//            residual once
// Moves      (Cin + Cout (+ Cout with a residual)) * sizeof(T) bytes a pixel, 27% more of x for halos (float32 41%), weights from L2
//            once per tile (Cin * 9 * COLUMNS * sizeof(T) for 256 pixels);   18 * Cin * Cout FLOP a pixel
// Limit      bf16 64 -> 64: 288 FLOP a byte, at the balance point of an H100 (798 TFLOP/s, 3.0 TB/s: 266); a warp's ldmatrix
//            reads 8 KB for 48 mma, 64 cycles of shared memory against 96 of an A100's tensor core: bound by mma.sync's rate.
//            float32: bound by fused multiply-adds (16 16-byte loads for 256 of them and 32 plain adds)
//
// predicted / measured, 1x64x256x256 -> 64, forward (4.83 GFLOP):
//   bf16     A100 0.035 ms (256 tiles on 216 places) / not measured yet      H100 0.012 ms / not measured yet
//   float32  A100 0.33 ms / not measured yet       H100 0.10 ms / not measured yet
#pragma once

#include <algorithm>

#include "cuda/conv3x3_epilogue.cuh"
#include "cuda/conv3x3_pack.cuh"
#include "cuda/hopper/conv3x3.cuh"

namespace fastsr::cuda {

template <class T, class Tile, class Sink>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    conv3x3_kernel(ConvInput<T> input, ConvWeights<T> weights, ConvBias<T> bias, Conv3x3Epilogue<T, Sink> epilogue) {
  const TilePosition tile = tile_position<Tile>(blockIdx.x, input.height, input.width, weights.columns);
  ConvProduct<T, Tile> product;
  product.for_each_run([&](int, int, int first, auto& sums) {
#pragma unroll
    for (int i = 0; i < Tile::run; ++i) {
      const int channel = tile.column + first + i;
      const bool present = bias.data != nullptr && channel < epilogue.cout;
      sums[i] = present ? to_float(bias.data[shuffled_source(channel, epilogue.cout, epilogue.pixel_shuffle) * bias.stride]) : 0.0f;
    }
  });
  constexpr int kBytes = std::max(Tile::shared_bytes, Sink::template shared_bytes<Tile>);
  for_each_chunk<Tile, kBytes>(input, weights, tile,
                               [&](const unsigned char* halo, const unsigned char* taps) { product.multiply(halo, taps); });
  epilogue.sink.begin();
  product.for_each_run([&](int row, int column, int first, const auto& sums) {
    if (tile.y + row < input.height && tile.x + column < input.width) {
      epilogue(sums, tile.image, tile.y + row, tile.x + column, tile.column + first, epilogue.sink);
    }
  });
  epilogue.sink.finish(tile, input.height, input.width, epilogue.cout);
}

// `stacked` as Conv3x3Call's.
template <class Products>
PackedLayout packed_layout(int cout, int stacked) {
  if (stacked) return hopper::packed_layout(cout, stacked);
  return Products::with_tile(cout, [&]<class Tile>(Tile) {
    return PackedLayout{(cout + Tile::columns - 1) / Tile::columns * Tile::columns, Tile::group, Tile::pair, 0};
  });
}

// Conv3x3Call::stacked of a convolution that reads `channels` channels of x, where kernels for sm_90a can run or not.
template <class T, class Launch>
int stacked_outputs(const Launch& launch, ImageView<const T> x, int channels, int cout, int upsample = 1) {
  const int columns = conv3x3_tile_columns(cout);
  const bool can = sizeof(T) == 2 && launch.hopper() && upsample == 1 && columns > 16 && hopper::can_read(x, channels);
  return can ? hopper::kProductRows / columns : 0;
}

template <class Products, class T, class Launch>
int64_t tiles_of_image(const Launch& launch, const Conv3x3Call<T>& call) {
  const auto count = [&]<class Tile>(Tile) { return tiles_of<Tile>(call.height, call.width); };
  if constexpr (sizeof(T) == 2) {
    if (call.stacked) return hopper::with_tile(launch.multiprocessors(), call, count);
  }
  return Products::with_tile(call.cout, count);
}

// Convolves with packed weights. launch(kernel, blocks, threads, shared bytes, arguments...) starts a kernel; make_sink<Tile>() is told
// of what is stored.
template <class Products, class T, class Launch, class MakeSink>
void convolve_into(const Launch& launch, const Conv3x3Call<T>& call, MakeSink make_sink) {
  if constexpr (sizeof(T) == 2) {
    if (call.stacked) return hopper::convolve_into(launch, call, make_sink);
  }
  Products::with_tile(call.cout, [&]<class Tile>(Tile) {
    const int columns = packed_layout<Products>(call.cout, 0).columns;
    const auto sink = make_sink.template operator()<Tile>();
    using Sink = std::decay_t<decltype(sink)>;
    const int64_t blocks = call.batch * tiles_of<Tile>(call.height, call.width) * (columns / Tile::columns);
    launch(conv3x3_kernel<T, Tile, Sink>, blocks, Tile::threads, std::max(Tile::shared_bytes, Sink::template shared_bytes<Tile>),
           ConvInput<T>{call.x, call.cin, call.height, call.width, call.upsample - 1, call.x.starts_at_16_bytes(), call.scaling},
           ConvWeights<T>{call.packed, columns}, ConvBias<T>{call.bias, call.bias_stride}, epilogue_of(call, sink));
  });
}

template <class Products, class T, class Launch>
void convolve(const Launch& launch, const Conv3x3Call<T>& call) {
  convolve_into<Products>(launch, call, MakeNoSink{});
}

// Elements of the buffer that pack_and_convolve fills; call.stacked is that of stacked_outputs.
template <class Products, class T>
int64_t packed_size(const Conv3x3Call<T>& call, bool wide) {
  return packed_layout<Products>(call.cout, call.stacked).template size<T>(call.cin) + (wide ? call.cout : 0);
}

// Packs the weights into `packed` and convolves. A wide bias is packed too; call.bias is not looked at.
template <class Products, class T, class Launch>
void pack_and_convolve(const Launch& launch, Conv3x3Call<T> call, const Parameter<T>& weight, const WeightStrides& strides,
                       const Parameter<T>& bias, int64_t bias_stride, T* packed) {
  if (call.batch == 0) return;
  const PackedLayout layout = packed_layout<Products>(call.cout, call.stacked);
  const int span = layout.template padded<T>(call.cin);
  std::vector<PackPart<T>> parts{{weight, strides, 0, layout, call.cin, 0, call.cin, span, call.cout, call.pixel_shuffle, 0}};
  call.bias = static_cast<const T*>(bias.data), call.bias_stride = bias_stride;
  if (bias.data && bias.wide) {
    const int64_t offset = layout.template size<T>(call.cin);
    parts.push_back(copied(bias, bias_stride, call.cout, offset));
    call.bias = packed + offset, call.bias_stride = 1;
  }
  pack_weights<T>(launch, parts, packed);
  call.packed = packed;
  convolve<Products>(launch, call);
}

}  // namespace fastsr::cuda
