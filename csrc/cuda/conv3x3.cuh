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

#include "cuda/conv3x3_pack.cuh"

namespace fastsr::cuda {

// y = scale2 * (scale * factors * f(convolution + bias) + skip) + skip2, all of y's shape; f is LeakyReLU or, where a mask is given,
// the product with LeakyReLU's derivative at the sign of the mask's values.
template <class T>
struct Conv3x3Call {
  ImageView<const T> x;
  const T* packed;  // weights, laid out for the product that convolves
  const T* bias;    // may be null
  int64_t bias_stride;
  ImageView<const T> mask, skip, skip2;
  ImageView<T> out;
  int64_t batch;
  int cin, cout;      // cout counts channels before PixelShuffle
  int height, width;  // of the convolution's output before PixelShuffle
  int upsample, pixel_shuffle;
  float negative_slope, scale, scale2;
  const float* factors;  // [batch][cout], or null for ones; without PixelShuffle only
};

// What may look at the values of y as they are stored; a sink is made for one tile. All threads of a block call begin before the first
// value is put and finish after the last one; PixelShuffle and sinks do not go together.
struct NoSink {
  __device__ __forceinline__ void begin() const {}
  template <class P>
  __device__ __forceinline__ void put(const P& /* channels side by side */, int /* y */, int /* x */, int /* channel */) const {}
  __device__ __forceinline__ void finish(const TilePosition&, int /* height */, int /* width */, int /* cout */) const {}
};

struct MakeNoSink {
  template <class Tile>
  NoSink operator()() const { return {}; }
};

// From sums to y.
template <class T, class Sink>
struct Conv3x3Epilogue {
  ImageView<const T> mask, skip, skip2;
  ImageView<T> out;
  int cout, pixel_shuffle;
  float negative_slope, scale, scale2;
  const float* factors;
  bool vectors;  // 16-byte runs of channels lie in one pixel of y and start at multiples of 16 bytes
  Sink sink;

  __device__ __forceinline__ float activate(float v) const {
    if (negative_slope == 0.0f) return v <= 0.0f ? 0.0f : v;  // this way round, NaN stays
    return v > 0.0f ? v : v * negative_slope;
  }

  template <int RUN>
  __device__ __forceinline__ void operator()(const float (&sums)[RUN], int64_t image, int y, int x, int channel) const {
    constexpr int kPack = RUN * sizeof(T) < 16 ? RUN : 16 / sizeof(T);
#pragma unroll
    for (int first = 0; first < RUN; first += kPack) {
      if (vectors && channel + first + kPack <= cout) {
        store<kPack>(sums + first, image, y, x, channel + first);
      } else {
        // A rolled loop that picks its value: unrolled, this rare path would be most of the kernel's code.
        const int count = min(kPack, cout - channel - first);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          float sum = sums[first];
#pragma unroll
          for (int other = 1; other < kPack; ++other) sum = i == other ? sums[first + other] : sum;
          store<1>(&sum, image, y, x, channel + first + i);
        }
      }
    }
  }

  // COUNT channels that lie side by side in one pixel of y.
  template <int COUNT>
  __device__ __forceinline__ void store(const float* sums, int64_t image, int y, int x, int channel) const {
    if (pixel_shuffle != 1) {
      const int per_pixel = cout / (pixel_shuffle * pixel_shuffle), sub = channel / per_pixel;
      y = y * pixel_shuffle + sub / pixel_shuffle, x = x * pixel_shuffle + sub % pixel_shuffle;
      channel -= sub * per_pixel;
    }
    float v[COUNT];
    if (mask.data) {
      const auto saved = load<COUNT>(mask, image, y, x, channel);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] = to_float(saved.v[i]) > 0.0f ? sums[i] : sums[i] * negative_slope;
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] = activate(sums[i]);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] *= factors ? scale * factors[image * cout + channel + i] : scale;
    if (skip.data) {
      const auto other = load<COUNT>(skip, image, y, x, channel);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] += to_float(other.v[i]);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] *= scale2;
    if (skip2.data) {
      const auto other = load<COUNT>(skip2, image, y, x, channel);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] += to_float(other.v[i]);
    }
    Pack<T, COUNT> result;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) result.v[i] = from_float<T>(v[i]);
    *reinterpret_cast<Pack<T, COUNT>*>(out.at(image, y, x) + channel) = result;
    sink.put(result, y, x, channel);
  }

  template <int COUNT>
  __device__ __forceinline__ Pack<T, COUNT> load(const ImageView<const T>& view, int64_t image, int y, int x, int channel) const {
    return *reinterpret_cast<const Pack<T, COUNT>*>(view.at(image, y, x) + channel);
  }
};

template <class T>
struct ConvBias {
  const T* data;  // may be null
  int64_t stride;
};

template <class T, class Tile, class Sink>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    conv3x3_kernel(ConvInput<T> input, ConvWeights<T> weights, ConvBias<T> bias, Conv3x3Epilogue<T, Sink> epilogue) {
  const TilePosition tile = tile_position<Tile>(input.height, input.width, weights.columns);
  ConvProduct<T, Tile> product;
  product.for_each_run([&](int, int, int first, auto& sums) {
#pragma unroll
    for (int i = 0; i < Tile::run; ++i) {
      const int channel = tile.column + first + i;
      const bool present = bias.data != nullptr && channel < epilogue.cout;
      sums[i] = present ? to_float(bias.data[shuffled_source(channel, epilogue.cout, epilogue.pixel_shuffle) * bias.stride]) : 0.0f;
    }
  });
  for_each_chunk<Tile>(input, weights, tile,
                       [&](const unsigned char* halo, const unsigned char* taps) { product.multiply(halo, taps); });
  epilogue.sink.begin();
  product.for_each_run([&](int row, int column, int first, const auto& sums) {
    if (tile.y + row < input.height && tile.x + column < input.width) {
      epilogue(sums, tile.image, tile.y + row, tile.x + column, tile.column + first);
    }
  });
  epilogue.sink.finish(tile, input.height, input.width, epilogue.cout);
}

// Columns of a tile: few for the last layers (3 channels), else whatever of 64 and 32 pads less; wider reuses the halo more.
inline int conv3x3_tile_columns(int cout) {
  if (cout <= 16) return 16;
  return (cout + 63) / 64 * 64 > (cout + 31) / 32 * 32 ? 32 : 64;
}

// How products are computed, and with which tile for a number of columns.
struct TensorCores {  // bf16, f16; float32 rounded to tf32
  template <class Visit>
  static auto with_tile(int cout, Visit visit) {
    switch (conv3x3_tile_columns(cout)) {
      case 64: return visit(ConvTile<16, 64, 256, 2, 2>{});
      case 32: return visit(ConvTile<16, 32, 128, 4, 2>{});
      default: return visit(ConvTile<16, 16, 128, 4, 2>{});
    }
  }
};
struct FusedMultiplyAdds {  // float32 with IEEE products
  template <class Visit>
  static auto with_tile(int cout, Visit visit) {
    switch (conv3x3_tile_columns(cout)) {
      case 64: return visit(ConvTile<8, 64, 128, 2, 1>{});
      case 32: return visit(ConvTile<8, 32, 128, 3, 1>{});
      default: return visit(ConvTile<8, 16, 128, 4, 1>{});
    }
  }
};
template <class T>
using ExactProducts = std::conditional_t<std::is_same_v<T, float>, FusedMultiplyAdds, TensorCores>;

template <class Products>
PackedLayout packed_layout(int cout) {
  return Products::with_tile(cout, [&]<class Tile>(Tile) {
    return PackedLayout{(cout + Tile::columns - 1) / Tile::columns * Tile::columns, Tile::group, Tile::pair};
  });
}

template <class Products, class T>
int64_t tiles_of_image(const Conv3x3Call<T>& call) {
  return Products::with_tile(call.cout, [&]<class Tile>(Tile) {
    return static_cast<int64_t>((call.height + Tile::rows - 1) / Tile::rows) * ((call.width + kTileWidth - 1) / kTileWidth);
  });
}

// Convolves with packed weights. launch(kernel, blocks, threads, shared bytes, arguments...) starts a kernel; make_sink<Tile>() is told
// of what is stored.
template <class Products, class T, class Launch, class MakeSink>
void convolve_into(const Launch& launch, const Conv3x3Call<T>& call, MakeSink make_sink) {
  Products::with_tile(call.cout, [&]<class Tile>(Tile) {
    const int columns = packed_layout<Products>(call.cout).columns, r = call.pixel_shuffle;
    const bool whole_runs = r == 1 || call.cout / (r * r) % (16 / static_cast<int>(sizeof(T))) == 0;
    const bool vectors = whole_runs && call.out.starts_at_16_bytes() && call.mask.starts_at_16_bytes() && call.skip.starts_at_16_bytes() &&
                         call.skip2.starts_at_16_bytes();  // a view of nothing does
    const auto sink = make_sink.template operator()<Tile>();
    using Sink = std::decay_t<decltype(sink)>;
    const int64_t blocks = call.batch * tiles_of_image<Products>(call) * (columns / Tile::columns);
    launch(conv3x3_kernel<T, Tile, Sink>, blocks, Tile::threads, Tile::shared_bytes,
           ConvInput<T>{call.x, call.cin, call.height, call.width, call.upsample - 1, call.x.starts_at_16_bytes()},
           ConvWeights<T>{call.packed, columns}, ConvBias<T>{call.bias, call.bias_stride},
           Conv3x3Epilogue<T, Sink>{call.mask, call.skip, call.skip2, call.out, call.cout, r, call.negative_slope, call.scale, call.scale2,
                                    call.factors, vectors, sink});
  });
}

template <class Products, class T, class Launch>
void convolve(const Launch& launch, const Conv3x3Call<T>& call) {
  convolve_into<Products>(launch, call, MakeNoSink{});
}

// Elements of the buffer that pack_and_convolve fills.
template <class Products, class T>
int64_t packed_size(const Conv3x3Call<T>& call, bool wide) {
  return packed_layout<Products>(call.cout).template size<T>(call.cin) + (wide ? call.cout : 0);
}

// Packs the weights into `packed` and convolves. A wide bias is packed too; call.bias is not looked at.
template <class Products, class T, class Launch>
void pack_and_convolve(const Launch& launch, Conv3x3Call<T> call, const Parameter<T>& weight, const WeightStrides& strides,
                       const Parameter<T>& bias, int64_t bias_stride, T* packed) {
  if (call.batch == 0) return;
  const int span = (call.cin + kChunk<T> - 1) / kChunk<T> * kChunk<T>;
  const PackedLayout layout = packed_layout<Products>(call.cout);
  std::vector<PackPart<T>> parts{{weight, strides, 0, layout, 0, call.cin, span, call.cout, call.pixel_shuffle, 0}};
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
