// Shared memory and the asynchronous copies into it (cp.async, sm_80 and later).
#pragma once

#include <cstdint>

namespace fastsr::cuda {

// The block's dynamic shared memory. BYTES repeats what the launch asks for; the comment in the PTX tells the resource ledger.
template <int BYTES>
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  asm volatile("// dynamic shared memory: %0 bytes" ::"n"(BYTES));
  return memory;
}

// The same at a multiple of 1024, as tiles that TMA and wgmma swizzle need it.
template <int BYTES>
__device__ __forceinline__ unsigned char* dynamic_shared_1024() {
  extern __shared__ __align__(1024) unsigned char memory_1024[];
  asm volatile("// dynamic shared memory: %0 bytes" ::"n"(BYTES));
  return memory_1024;
}

// A shared-memory pointer as PTX's 32-bit shared addresses.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier among the first THREADS threads of the block, a multiple of 32.
template <int THREADS>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// Starts a copy of `bytes` <= 16 bytes and fills the rest of the 16 with zeros; nothing behind `bytes` is read.
// Both addresses are multiples of 16. The data are there after wait_copies, for other threads after a barrier too.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

// Closes the group of all copies that this thread has started since the last commit.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are still under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace fastsr::cuda
