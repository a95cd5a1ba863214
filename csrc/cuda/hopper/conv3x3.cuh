// The fused 3x3 convolution on Hopper: as conv3x3.cuh, with the products by wgmma (weights are the 64 rows, pixels the columns) and the
// halo tile by TMA, whose zeros outside the image are the padding. conv_layout.cuh draws where the operands lie.
//
//   grid.x = min(tiles, what the GPU holds at once); a block walks tiles           tiles of one picture, column blocks fastest
//
//        the last warp, one thread   halo tile, 64 bytes of channels   ==copy_box==>  ring of 2 or 3 stages
//                                    filters of the same channels      ==copy_bulk=>  2 places; where all fit, once for all tiles
//        a warpgroup of STRIPS       a strip of 8 x N/8 pixels (x 2 rows with 32 outputs), all outputs of the tile: for each stage
//                                    9 taps (12 shifts) x 2 steps of m64nNk16 into N/2 sums; then the epilogue of conv3x3_epilogue.cuh
//
//        outputs   tile (w x h)   N    blocks on a multiprocessor   bytes of shared memory a product reads, a clock (128 are served)
//          64        16 x 16     128    2, with sums of y 1          (2 KiB + 4 KiB) / 64 =  96
//          64        24 x 12      96    1                            (2 KiB + 3 KiB) / 48 = 107      16 pictures of 48 x 48: 128 tiles
//          32        16 x 32     128    1                                                    96
//          32        24 x 12      48    1                            (2 KiB + 1.5 KiB) / 24 = 146
//
// Lives in   registers: N/2 sums    shared: halo 64 bytes a pixel and stage, filters 36 or 26 KiB a place
// Moves      as conv3x3.cuh; 16 x 16 tiles read 1.27 of x for halos, and 115 KiB from L2 for 64 channels and 4608 clocks of products, 25 bytes
//            a clock, which is what L2 gives (5.5 TB/s over 132 multiprocessors): bound by it where filters stream (more than 64 input
//            channels), 9 bytes a clock where they stay
// Limit      4096 operations a clock and multiprocessor, 950 TFLOP/s at 1.755 GHz; a run at 798 is 84% of it
//
// TMA        16 bytes of a pixel at a time in the unswizzled layout, which every descriptor can shift; whether tiles with 64-byte swizzles
//            can be shifted too, and load faster, is what benchmarks/native/conv_wgmma.cu asks
//
// Epilogue   a lane's sums of rows r and r + 8 are neighbouring channels (the filters are packed so); one exchange with the neighbouring
//            lane makes four channels of one pixel, 8 bytes to store, 32 bytes side by side for four lanes
//
// predicted / measured, H100 (132 multiprocessors), bf16, kernel alone:
//   64 -> 64     16x48x48     2.7 GFLOP     5184 clocks of products, 1500 to fill and to end    0.0040 ms / not measured yet
//                1x256x256    4.8 GFLOP     2 tiles of 4608, 1500                                0.0062 ms / not measured yet
//                1x540x960   38.2 GFLOP    16 tiles of 4608, 1500                                0.043 ms  / not measured yet
//   192 -> 64    1x540x960  114.7 GFLOP    16 tiles of 3 x 4608, L2                              0.13 ms   / not measured yet
//   160 -> 32    1x540x960   47.8 GFLOP     8 tiles of 15360, 8 ends of 1200                     0.075 ms  / not measured yet
#pragma once

#include <algorithm>

#include "cuda/conv3x3_epilogue.cuh"
#include "cuda/conv3x3_pack.cuh"
#include "cuda/hopper/conv_layout.cuh"
#include "cuda/hopper/enabled.cuh"
#include "cuda/hopper/tensor_map.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/hopper/wgmma.cuh"

namespace fastsr::cuda::hopper {

// What a block owns: STRIPS strips of BLOCKS x 8 pixels, GROUPS rows of pixels in each block of 8.
template <int GROUPS, int STRIPS, int BLOCKS, int STAGES, int PER_MULTIPROCESSOR, Swizzle SWIZZLE = Swizzle::none>
struct WgmmaTile {
  static constexpr int groups = GROUPS, strips = STRIPS, strip_blocks = BLOCKS, stages = STAGES, blocks = PER_MULTIPROCESSOR;
  static constexpr int rows = GROUPS * BLOCKS, width = kStrip * STRIPS, columns = kProductRows / GROUPS, pixels = kStrip * BLOCKS;
  static constexpr int workers = STRIPS * 128, threads = workers + 32;
  using Halo = HaloLayout<width + 2, rows + 2, SWIZZLE>;
  static constexpr Swizzle swizzle = SWIZZLE;
  static constexpr int filter_bytes = FilterStack{GROUPS}.rows() * kStageBytes, places = 2;
  static constexpr int barriers_at = STAGES * Halo::bytes + places * filter_bytes;
  static constexpr int shared_bytes = barriers_at + 2 * (STAGES + places) * static_cast<int>(sizeof(Barrier));
  static_assert(Halo::bytes % 128 == 0 && filter_bytes % 128 == 0);
};

template <class T>
struct WgmmaConv {
  CUtensorMap input;
  const T* packed;
  int height, width, columns;  // columns padded to the tile's
  int chunks;                  // of the input channels
  unsigned tiles;
  bool resident;               // all filters that a block needs fit in its places
};

// Shared memory, and whose turn it is.
template <class Tile>
struct ConvRing {
  unsigned char* start;

  __device__ __forceinline__ unsigned char* halo(int i) const { return start + i % Tile::stages * Tile::Halo::bytes; }
  __device__ __forceinline__ unsigned char* filters(int i) const {
    return start + Tile::stages * Tile::Halo::bytes + i % Tile::places * Tile::filter_bytes;
  }
  __device__ __forceinline__ Barrier* barriers() const { return reinterpret_cast<Barrier*>(start + Tile::barriers_at); }
  __device__ __forceinline__ Barrier& halo_full(int i) const { return barriers()[i % Tile::stages]; }
  __device__ __forceinline__ Barrier& halo_empty(int i) const { return barriers()[Tile::stages + i % Tile::stages]; }
  __device__ __forceinline__ Barrier& filters_full(int i) const { return barriers()[2 * Tile::stages + i % Tile::places]; }
  __device__ __forceinline__ Barrier& filters_empty(int i) const { return barriers()[2 * Tile::stages + Tile::places + i % Tile::places]; }

  static __device__ __forceinline__ ConvRing make() {
    const ConvRing ring{dynamic_shared_1024<Tile::shared_bytes>()};
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < Tile::stages; ++i) ring.halo_full(i).init(1), ring.halo_empty(i).init(Tile::workers / 32);
#pragma unroll
      for (int i = 0; i < Tile::places; ++i) ring.filters_full(i).init(1), ring.filters_empty(i).init(Tile::workers / 32);
      fence_barriers();
    }
    __syncthreads();
    return ring;
  }

  // The producer's part, a thread of its own.
  template <class T>
  __device__ __forceinline__ void fill(const WgmmaConv<T>& conv) const {
    prefetch_map(conv.input);
    int i = 0;  // the stage
    bool first = true;
#pragma unroll 1
    for (unsigned number = blockIdx.x; number < conv.tiles; number += gridDim.x, first = false) {
      const TilePosition tile = tile_position<Tile>(number, conv.height, conv.width, conv.columns);
      const int left = tile.x - 1, top = tile.y - 1, image = static_cast<int>(tile.image);
      const int64_t blobs = static_cast<int64_t>(tile.column / Tile::columns) * conv.chunks;
      const char* packed = reinterpret_cast<const char*>(conv.packed) + blobs * Tile::filter_bytes;
#pragma unroll 1
      for (int chunk = 0; chunk < conv.chunks; ++chunk, ++i) {
        halo_empty(i).wait(i / Tile::stages % 2 ^ 1);
        halo_full(i).arrive_expecting(Tile::Halo::box_bytes);
        if constexpr (Tile::Halo::planes) {
          copy_box(halo(i), conv.input, {0, left, top, chunk * kStageUnits, image}, halo_full(i));
        } else {
          copy_box(halo(i), conv.input, {chunk * kStageBytes / static_cast<int>(sizeof(T)), left, top, image}, halo_full(i));
        }
        if (conv.resident && !first) continue;
        if (!conv.resident) filters_empty(i).wait(i / Tile::places % 2 ^ 1);
        filters_full(i).arrive_expecting(Tile::filter_bytes);
        copy_bulk(filters(i), packed + static_cast<int64_t>(chunk) * Tile::filter_bytes, Tile::filter_bytes, filters_full(i));
      }
    }
  }

  // Waits for stage i, the tile's chunk `chunk`; the place of its filters.
  __device__ __forceinline__ int wait(int i, int chunk, bool resident) const {
    halo_full(i).wait(i / Tile::stages % 2);
    const int place = resident ? chunk : i;
    filters_full(place).wait(resident ? 0 : i / Tile::places % 2);
    return place;
  }

  // A warp has read stage i.
  __device__ __forceinline__ void release(int i, bool resident) const {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    halo_empty(i).arrive();
    if (!resident) filters_empty(i).arrive();
  }
};

// A warpgroup's strip of a tile: a thread holds the channels of rows r and r + 8, two pixels of each block.
template <class T, class Tile>
struct StripProduct {
  float sums[Tile::pixels / 2], bias[2];

  static __device__ __forceinline__ int strip() { return threadIdx.x / 128; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x % 128 / 32 * 16; }  // of the warp's 16
  static __device__ __forceinline__ int group() { return first_row() / Tile::columns; }
  // After the exchange a thread has four channels, from here on, of one pixel of each block.
  static __device__ __forceinline__ int channel() { return first_row() % Tile::columns + threadIdx.x % 32 / 8 * 4; }
  static __device__ __forceinline__ int column() { return strip() * kStrip + threadIdx.x % 4 * 2 + threadIdx.x / 4 % 2; }

  // The bias is added behind the products: sums that start with it would make ptxas put the products one after the other.
  __device__ __forceinline__ void start(const ConvBias<T>& from, int first_channel, int cout, int pixel_shuffle) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = first_channel + first_row() % Tile::columns + threadIdx.x % 32 / 4 * 2 + half;
      const bool present = from.data != nullptr && channel < cout;
      bias[half] = present ? to_float(from.data[shuffled_source(channel, cout, pixel_shuffle) * from.stride]) : 0.0f;
    }
  }

  // Puts a stage's products under way. The first stage of a tile does not add.
  __device__ __forceinline__ void multiply(uint32_t halo, uint32_t filters, bool first_stage) {
    constexpr FilterStack kStack{Tile::groups};
    const int first = strip() * kStrip;
    fence();
#pragma unroll
    for (int kw = 0; kw < 3; ++kw) {
#pragma unroll
      for (int dh = 0; dh < kStack.shifts(); ++dh) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          hopper::multiply<T, Tile::pixels>(sums, kStack.descriptor(filters, dh, kw, step),
                                            Tile::Halo::descriptor(halo, dh * (Tile::width + 2) + first + kw, step, Tile::groups),
                                            kw + dh + step > 0 || !first_stage);
        }
      }
    }
    commit();
  }

  // The four channels of this thread's pixel in a block: pairs change places with the neighbour that has the next two channels.
  __device__ __forceinline__ void run_of(int block, float (&run)[4]) const {
    const float* own = sums + block * 4;  // [row r, r + 8][pixel]
    const bool odd = threadIdx.x / 4 % 2;
    float keep[2], got[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      keep[half] = (odd ? own[2 * half + 1] : own[2 * half]) + bias[half];
      got[half] = __shfl_xor_sync(0xffffffffu, (odd ? own[2 * half] : own[2 * half + 1]) + bias[half], 4);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      run[half] = odd ? got[half] : keep[half];
      run[2 + half] = odd ? keep[half] : got[half];
    }
  }
};

template <class Tile, class Sink>
constexpr int kResident = Sink::collects ? 1 : Tile::blocks;  // the sums of rows would spill with the registers of two blocks

// A sink for tiles of Tile: partial[tile][tap][cout] as TapSums of conv3x3_sums.cuh. A thread's four channels and its column of the tile
// are the same in all blocks: it sums rows in registers, and the block adds columns in shared memory.
template <class T, class Tile>
struct StripSums {
  static constexpr bool collects = true;
  float* partial;
};

template <class T, class Tile>
struct StripSumsOfTile {
  static_assert(3 * kProductRows * Tile::width * static_cast<int>(sizeof(float)) <= Tile::Halo::bytes);
  float* partial;
  int height;
  float rows[3][4];  // of kernel row kh

  template <int COUNT>
  __device__ __forceinline__ void put(const Pack<T, COUNT>& stored, int y, int /* x */, int channel) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = COUNT == 4 || channel % 4 == i ? to_float(stored.v[COUNT == 4 ? i : 0]) : 0.0f;
      rows[0][i] += y != height - 1 ? value : 0.0f;
      rows[1][i] += value;
      rows[2][i] += y != 0 ? value : 0.0f;
    }
  }

  template <class Product>
  __device__ __forceinline__ void finish(const TilePosition& tile, int width, int cout, float* memory) const {
    sync_threads<Tile::workers>();  // the stage is read no more
    const int mine = (Product::group() * Tile::width + Product::column()) * Tile::columns + Product::channel();
#pragma unroll
    for (int kh = 0; kh < 3; ++kh) {  // [kh][group][column][channel]
      *reinterpret_cast<Pack<float, 4>*>(memory + kh * kProductRows * Tile::width + mine) = {rows[kh][0], rows[kh][1], rows[kh][2], rows[kh][3]};
    }
    sync_threads<Tile::workers>();
#pragma unroll 1
    for (int i = threadIdx.x; i < kTaps * Tile::columns; i += Tile::workers) {
      const int tap = i / Tile::columns, kw = tap % 3, channel = i % Tile::columns;
      const float* of_row = memory + tap / 3 * kProductRows * Tile::width + channel;
      const int missing = kw == 0 ? width - 1 - tile.x : kw == 2 ? -tile.x : -1;  // the column that this tap does not read
      float sum = 0.0f;
#pragma unroll 8
      for (int at = 0; at < Tile::groups * Tile::width; ++at) sum += at % Tile::width != missing ? of_row[at * Tile::columns] : 0.0f;
      if (tile.column + channel < cout) partial[(static_cast<int64_t>(tile.number) * kTaps + tap) * cout + tile.column + channel] = sum;
    }
    fence_async_proxy();
  }
};

__device__ __forceinline__ NoSink sink_of_tile(const NoSink& sink, int /* height */) { return sink; }
template <class T, class Tile>
__device__ __forceinline__ StripSumsOfTile<T, Tile> sink_of_tile(const StripSums<T, Tile>& sink, int height) {
  return {sink.partial, height, {}};
}

template <class T, class Tile, class Sink>
__global__ void __launch_bounds__(Tile::threads, kResident<Tile, Sink>)
    conv3x3_hopper(const __grid_constant__ WgmmaConv<T> conv, ConvBias<T> bias, const __grid_constant__ Conv3x3Epilogue<T, Sink> epilogue) {
#if FASTSR_SM90A
  using Product = StripProduct<T, Tile>;
  const auto ring = ConvRing<Tile>::make();
  if (threadIdx.x >= Tile::workers) {
    if (threadIdx.x == Tile::workers) ring.fill(conv);
    return;
  }
  int i = 0;  // the stage
#pragma unroll 1
  for (unsigned number = blockIdx.x; number < conv.tiles; number += gridDim.x) {
    const TilePosition tile = tile_position<Tile>(number, conv.height, conv.width, conv.columns);
    Product product;
    product.start(bias, tile.column, epilogue.cout, epilogue.pixel_shuffle);
#pragma unroll 1
    for (int chunk = 0; chunk < conv.chunks; ++chunk, ++i) {
      const int place = ring.wait(i, chunk, conv.resident);
      product.multiply(shared_address(ring.halo(i)), shared_address(ring.filters(place)), chunk == 0);
      if (chunk > 0) {
        wait<1>();
        ring.release(i - 1, conv.resident);
      }
    }
    wait<0>(product.sums);
    if constexpr (!Sink::collects) ring.release(i - 1, conv.resident);
    auto sink = sink_of_tile(epilogue.sink, conv.height);
    const int x = tile.x + Product::column();
#pragma unroll
    for (int block = 0; block < Tile::strip_blocks; ++block) {
      float run[4];
      product.run_of(block, run);
      const int y = tile.y + block * Tile::groups + Product::group();
      if (y < conv.height && x < conv.width) epilogue(run, tile.image, y, x, tile.column + Product::channel(), sink);
    }
    if constexpr (Sink::collects) {
      // In the last stage, which nobody multiplies any more.
      sink.template finish<Product>(tile, conv.width, epilogue.cout, reinterpret_cast<float*>(ring.halo(i - 1)));
      ring.release(i - 1, conv.resident);
    }
  }
#else
  not_for_this_gpu();
#endif
}

inline PackedLayout packed_layout(int cout, int groups) {
  const int outputs = kProductRows / groups;
  return {(cout + outputs - 1) / outputs * outputs, 16, 1, groups};
}

// Whether TMA can read the first `channels` channels of a picture: whole units of 16 bytes, no pixel read twice.
template <class T>
bool can_read(const ImageView<const T>& x, int channels) {
  constexpr int64_t kMost = int64_t{1} << 36;
  const auto fits = [](int64_t stride) { return stride > 0 && stride < kMost; };
  return x.starts_at_16_bytes() && channels % (kUnitBytes / static_cast<int>(sizeof(T))) == 0 && fits(x.strides.n) && fits(x.strides.h) &&
         fits(x.strides.w);
}

// The tile for a call, that which keeps the multiprocessors busy for the shorter time. Bits do not depend on it.
template <class T, class Visit>
auto with_tile(int multiprocessors, const Conv3x3Call<T>& call, Visit visit) {
  const auto choose = [&]<class Wide, class Narrow>(Wide wide, Narrow narrow) {
    const auto time = [&]<class Tile>(Tile) {
      const int64_t tiles = call.batch * tiles_of<Tile>(call.height, call.width) * ((call.cout + Tile::columns - 1) / Tile::columns);
      return (tiles + multiprocessors - 1) / multiprocessors * Tile::rows * Tile::width;
    };
    return 20 * time(narrow) < 19 * time(wide) ? visit(narrow) : visit(wide);
  };
  if (call.stacked == 1) return choose(WgmmaTile<1, 2, 16, 2, 2>{}, WgmmaTile<1, 3, 12, 3, 1>{});
  return choose(WgmmaTile<2, 2, 16, 3, 1>{}, WgmmaTile<2, 3, 6, 3, 1>{});
}

template <class Tile, class T>
WgmmaConv<T> describe(const Conv3x3Call<T>& call) {
  const ImageView<const T>& x = call.x;
  constexpr int kUnit = kUnitBytes / sizeof(T), kChannels = kStageBytes / sizeof(T);
  WgmmaConv<T> conv{};
  const int boxes_across = Tile::width + 2, boxes_down = Tile::rows + 2;
  if constexpr (Tile::Halo::planes) {
    conv.input = tensor_map<T, 5>(x.data, {kUnit, call.width, call.height, call.cin / kUnit, call.batch},
                                  {x.strides.w, x.strides.h, kUnit, x.strides.n}, {kUnit, boxes_across, boxes_down, kStageUnits, 1}, Tile::swizzle);
  } else {
    conv.input = tensor_map<T, 4>(x.data, {call.cin, call.width, call.height, call.batch}, {x.strides.w, x.strides.h, x.strides.n},
                                  {kChannels, boxes_across, boxes_down, 1}, Tile::swizzle);
  }
  conv.packed = call.packed;
  conv.height = call.height, conv.width = call.width, conv.columns = packed_layout(call.cout, Tile::groups).columns;
  conv.chunks = (call.cin + kChannels - 1) / kChannels;
  conv.tiles = static_cast<unsigned>(call.batch * tiles_of<Tile>(call.height, call.width) * (conv.columns / Tile::columns));
  return conv;
}

template <class Tile, class T, class Launch, class Sink>
void convolve_tiles(const Launch& launch, const Conv3x3Call<T>& call, const Sink& sink) {
  WgmmaConv<T> conv = describe<Tile>(call);
  const unsigned column_blocks = conv.columns / Tile::columns;
  // A block keeps its columns, so that filters can stay where they are.
  const unsigned places = std::max(1u, kResident<Tile, Sink> * static_cast<unsigned>(launch.multiprocessors()) / column_blocks) * column_blocks;
  conv.resident = conv.chunks <= Tile::places;
  launch(conv3x3_hopper<T, Tile, Sink>, std::min(conv.tiles, places), Tile::threads, Tile::shared_bytes, conv,
         ConvBias<T>{call.bias, call.bias_stride}, epilogue_of(call, sink));
}

template <class T, class Launch, class MakeSink>
void convolve_into(const Launch& launch, const Conv3x3Call<T>& call, MakeSink make_sink) {
  with_tile(launch.multiprocessors(), call, [&]<class Tile>(Tile) { convolve_tiles<Tile>(launch, call, make_sink.template operator()<Tile>()); });
}

}  // namespace fastsr::cuda::hopper
