// Barriers in shared memory that count threads and the bytes of asynchronous copies (sm_90). PTX ISA 8.7, 9.7.13.15.
//
// A barrier goes through phases. A phase ends when `count` arrivals have come and all bytes that were announced have been written;
// waiting for parity p returns once the phase of that parity (the first has 0) has ended, at once if the one before is running:
//
//     full, count 1             the producer announces bytes and arrives; copies end the phase       consumers wait
//     empty, count = consumers  each consumer arrives when it has read                               the producer waits
//
// A ring of stages waits for parity (use / stages) % 2 of `full`, and for the opposite of `empty`, whose first wait returns at once.
#pragma once

#include "cuda/copy.cuh"

namespace fastsr::cuda::hopper {

struct alignas(8) Barrier {
  uint64_t state;

  // One thread calls it, and then fence_barriers, before a barrier of the block. 9.7.13.15.9, mbarrier.init.
  __device__ __forceinline__ void init(uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(count) : "memory");
  }
  // 9.7.13.15.13, mbarrier.arrive: what this thread has read or written before is done for those who wait.
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // Arrives, and announces bytes of copies that name this barrier. 9.7.13.15.13, mbarrier.arrive.expect_tx.
  __device__ __forceinline__ void arrive_expecting(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes) : "memory");
  }
  // 9.7.13.15.16, mbarrier.try_wait: suspended by the hardware for a while at a time.
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n .reg .pred done;\n again:\n mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n @!done bra again;\n}" ::"r"(
            shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

// Makes initialised barriers visible to copies and to the cluster. 9.7.13.4, fence.mbarrier_init.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Puts this thread's ordinary accesses of shared memory before those that wgmma and bulk copies make after the next barrier.
// 9.7.13.4, fence.proxy.async.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace fastsr::cuda::hopper
