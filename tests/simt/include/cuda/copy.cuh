// Host twin of csrc/cuda/copy.cuh. A copy's 16 bytes are poison from its start until the thread that started it waits for it.
#pragma once

#include "simt.h"

namespace fastsr::cuda {

template <int BYTES>
unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(simt::running->dynamic(BYTES));
}

template <int BYTES>
unsigned char* dynamic_shared_1024() {
  return dynamic_shared<BYTES>();
}

template <int THREADS>
void sync_threads() {
  simt::running->barrier(1, THREADS);
}

inline uint32_t shared_address(const void* pointer) {
  simt::running->check_shared("a shared address", pointer, 1, 1);
  return simt::running->shared_address(pointer);
}

inline void copy_async_16(void* shared, const void* global, int bytes) {
  simt::running->check_shared("cp.async", shared, 16, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16) simt::fail("cp.async: a global address is not a multiple of 16");
  if (bytes < 0 || bytes > 16) simt::fail("cp.async: ", bytes, " source bytes; expected 0 to 16");
  std::memset(shared, simt::kPoison, 16);
  simt::running->self().open.push_back({shared, global, static_cast<size_t>(bytes)});
}

inline void commit_copies() {
  auto& self = simt::running->self();
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

template <int PENDING>
void wait_copies() {
  auto& groups = simt::running->self().groups;
  while (groups.size() > PENDING) {
    for (const simt::Copy& c : groups.front()) {
      std::memcpy(c.to, c.from, c.bytes);
      std::memset(static_cast<char*>(c.to) + c.bytes, 0, 16 - c.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace fastsr::cuda
