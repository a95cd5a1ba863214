// csrc/cuda/hopper on the CPU: its arithmetic, and a product of tiles that TMA brought and wgmma found by their descriptors.
#include "module.h"

#include "cuda/hopper/conv_layout.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/hopper/wgmma.cuh"

namespace {

using namespace fastsr::cuda;
using namespace fastsr::cuda::hopper;

// d (64 x N) = a (64 x K) b (N x K)^T from row `shift` of b's tile on, one warpgroup; K fills a span. Without a swizzle a box is one unit wide.
template <class T, int N, Swizzle SWIZZLE>
__global__ void multiply_tiles(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, float* d, int depth, int first, bool waits) {
  constexpr int kRowsB = N + 16, kMost = 128, kBytes = (64 + kRowsB) * kMost;
  unsigned char* start = dynamic_shared_1024<kBytes + 16>();
  Barrier& full = *reinterpret_cast<Barrier*>(start + kBytes);
  const int row_bytes = depth * static_cast<int>(sizeof(T)), unit = 16 / static_cast<int>(sizeof(T));
  unsigned char* right = start + 64 * row_bytes;
  if (threadIdx.x == 0) {
    full.init(1);
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    full.arrive_expecting((64 + kRowsB) * row_bytes);
    if constexpr (SWIZZLE == Swizzle::none) {
      for (int k = 0; k < depth; k += unit) {
        copy_box(start + k / unit * 64 * 16, a, {k, 0}, full);
        copy_box(right + k / unit * kRowsB * 16, b, {k, first}, full);
      }
    } else {
      copy_box(start, a, {0, 0}, full);
      copy_box(right, b, {0, first}, full);
    }
  }
  if (waits) full.wait(0);
  float sums[N / 2];
  fence();
  for (int step = 0; step < row_bytes / 32; ++step) {
    uint64_t left_at, right_at;
    if constexpr (SWIZZLE == Swizzle::none) {
      left_at = matrix_descriptor(SWIZZLE, shared_address(start + step * 2 * 64 * 16), 128, 64 * 16);
      right_at = matrix_descriptor(SWIZZLE, shared_address(right + step * 2 * kRowsB * 16), 128, kRowsB * 16);
    } else {
      left_at = tile_descriptor(SWIZZLE, shared_address(start), step * 32);
      right_at = tile_descriptor(SWIZZLE, shared_address(right), step * 32);
    }
    multiply<T, N>(sums, left_at, right_at, step > 0);
  }
  commit();
  hopper::wait<0>(sums);
  for (int i = 0; i < N / 2; ++i) d[fragment_row(threadIdx.x, i) * N + fragment_column(threadIdx.x, i)] = sums[i];
  full.wait(0);
}

// a (64 x depth), b (rows x depth) without gaps; the tile of b begins at row `first`, and what is outside of it is zero.
template <class T, int N, Swizzle SWIZZLE>
void product(uint64_t seed, uintptr_t a, uintptr_t b, int rows, int depth, int first, bool waits, uintptr_t d) {
  const int unit = 16 / static_cast<int>(sizeof(T));
  const auto map = [&](uintptr_t data, int64_t count, int box_rows) {
    return CUtensorMap{pointer<const unsigned char>(data), 2, sizeof(T), {depth, count}, {1, depth}, {SWIZZLE == Swizzle::none ? unit : depth, box_rows}, SWIZZLE};
  };
  simt::Launcher{seed, true}(multiply_tiles<T, N, SWIZZLE>, 1, 128, (64 + N + 16) * 128 + 16, map(a, 64, 64), map(b, rows, N + 16),
                             pointer<float>(d), depth, first, waits);
}

template <class T, int N>
void products(py::module_& m, const char* type) {
  const auto name = [&](int span) { return std::string(type) + "_" + std::to_string(N) + "_" + std::to_string(span); };
  m.def(name(16).c_str(), product<T, N, Swizzle::none>);
  m.def(name(32).c_str(), product<T, N, Swizzle::span32>);
  m.def(name(64).c_str(), product<T, N, Swizzle::span64>);
  m.def(name(128).c_str(), product<T, N, Swizzle::span128>);
}

// A ring of two stages between one producer and a warp of consumers; FORGETS never says that a stage is empty.
template <bool FORGETS>
__global__ void ring(const float* in, float* out, int rounds) {
  unsigned char* memory = dynamic_shared<2 * 128 + 4 * 8>();
  auto* full = reinterpret_cast<Barrier*>(memory + 256);
  Barrier* empty = full + 2;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) full[i].init(1), empty[i].init(32);
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x == 32) {
    for (int i = 0; i < rounds; ++i) {
      empty[i % 2].wait((i / 2 + 1) % 2);
      full[i % 2].arrive_expecting(128);
      copy_bulk(memory + i % 2 * 128, in + i * 32, 128, full[i % 2]);
    }
  } else if (threadIdx.x < 32) {
    float sum = 0;
    for (int i = 0; i < rounds; ++i) {
      full[i % 2].wait(i / 2 % 2);
      sum += reinterpret_cast<const float*>(memory + i % 2 * 128)[threadIdx.x];
      if (!FORGETS) empty[i % 2].arrive();
    }
    out[threadIdx.x] = sum;
  }
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, m) {
  products<__half, 64>(m, "float16");
  products<__half, 128>(m, "float16");
  products<__nv_bfloat16, 144>(m, "bfloat16");
  products<float, 256>(m, "tf32");
  m.def("ring", [](uint64_t seed, uintptr_t in, uintptr_t out, int rounds, bool forgets) {
    simt::Launcher{seed, true}(forgets ? ring<true> : ring<false>, 1, 64, 288, pointer<const float>(in), pointer<float>(out), rounds);
  });
  const auto span = [](uint32_t bytes) { return static_cast<Swizzle>(bytes); };
  m.def("swizzled", [=](uint32_t bytes, uint32_t address) { return swizzled(span(bytes), address); });
  m.def("tile_place", [=](uint32_t bytes, uint32_t row, uint32_t k) { return tile_place(span(bytes), row, k); });
  m.def("matrix_descriptor",
        [=](uint32_t bytes, uint32_t address, uint32_t rows, uint32_t units) { return matrix_descriptor(span(bytes), address, rows, units); });
  m.def("tile_descriptor", [=](uint32_t bytes, uint32_t address, uint32_t k) { return tile_descriptor(span(bytes), address, k); });
  m.def("filter_rows", [](int groups) { return FilterStack{groups}.rows(); });
  m.def("first_row", [](int groups, int dh, int kw) { return FilterStack{groups}.first_row(dh, kw); });
  m.def("filter_row", [](int groups, int row) {
    const auto at = FilterStack{groups}.at(row);
    return std::tuple(at.kh, at.kw, at.output);
  });
  using Planes = HaloLayout<18, 34, Swizzle::none>;
  using Swizzled = HaloLayout<18, 34, Swizzle::span64>;
  m.def("halo_place", [](bool exchanged, int pixel, int unit) { return exchanged ? Swizzled::place(pixel, unit) : Planes::place(pixel, unit); });
  m.def("halo_descriptor", [](bool exchanged, uint32_t address, int pixel, int step, int groups) {
    return exchanged ? Swizzled::descriptor(address, pixel, step, groups) : Planes::descriptor(address, pixel, step, groups);
  });
  m.def("fragment", [](int thread, int i) { return std::pair(fragment_row(thread, i), fragment_column(thread, i)); });
}
