// Host twin of csrc/cuda/hopper/tma.cuh: copies happen some time after they were started, their target being poison until then.
#pragma once

#include "cuda/hopper/layout.cuh"
#include "cuda/hopper/mbarrier.cuh"

// What the driver encodes, in the clear; sizes are the fastest first.
struct CUtensorMap {
  const unsigned char* data;
  int dims, element;  // bytes
  int64_t sizes[5], strides[5];  // in elements
  int box[5];
  fastsr::cuda::hopper::Swizzle swizzle;

  int box_bytes() const { return std::accumulate(box, box + dims, element, std::multiplies<>()); }
};

namespace fastsr::cuda::hopper {

inline void copy_bulk(void* shared, const void* global, uint32_t bytes, Barrier& barrier) {
  simt::running->check_shared("cp.async.bulk", shared, bytes, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16) simt::fail("cp.async.bulk: address or size is not a multiple of 16");
  std::memset(shared, simt::kPoison, bytes);
  simt::running->later([=, &barrier] {
    std::memcpy(shared, global, bytes);
    barrier.complete(bytes);
  });
}

inline void prefetch_map(const CUtensorMap&) {}

// The manual's picture of the swizzles: unit u of the 128-byte line r lies at u ^ r % 8, at u ^ r % 4 or u ^ r % 2 of shorter spans.
inline size_t box_place(Swizzle swizzle, size_t byte) {
  const size_t line = byte / 128, unit = byte / 16 % 8, units = span_of(swizzle) / 16;
  return line * 128 + (unit ^ line % units) * 16 + byte % 16;
}

template <int DIMS>
void copy_box(void* shared, const CUtensorMap& map, const int (&at)[DIMS], Barrier& barrier) {
  if (map.dims != DIMS) simt::fail("cp.async.bulk.tensor: a map of ", map.dims, " sizes");
  const int bytes = map.box_bytes();
  simt::running->check_shared("cp.async.bulk.tensor", shared, bytes, std::max<size_t>(128, map.swizzle == Swizzle::none ? 0 : block_bytes(map.swizzle)));
  if (map.swizzle != Swizzle::none && map.box[0] * map.element > static_cast<int>(span_of(map.swizzle))) simt::fail("a box wider than its swizzle");
  std::memset(shared, simt::kPoison, bytes);
  std::array<int, DIMS> first;
  std::copy(at, at + DIMS, first.begin());
  simt::running->later([=, &barrier] {
    for (int i = 0; i < bytes / map.element; ++i) {
      int64_t offset = 0;
      bool inside = true;
      for (int d = 0, rest = i; d < DIMS; rest /= map.box[d], ++d) {
        const int64_t place = first[d] + rest % map.box[d];
        inside = inside && place >= 0 && place < map.sizes[d];
        offset += place * map.strides[d];
      }
      unsigned char* to = static_cast<unsigned char*>(shared) + box_place(map.swizzle, size_t(i) * map.element);
      if (inside) std::memcpy(to, map.data + offset * map.element, map.element);
      else std::memset(to, 0, map.element);
    }
    barrier.complete(bytes);
  });
}

}  // namespace fastsr::cuda::hopper
