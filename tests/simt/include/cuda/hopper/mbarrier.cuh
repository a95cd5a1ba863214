// Host twin of csrc/cuda/hopper/mbarrier.cuh. Threads that wait for a phase are woken at its end; one that nobody ends is a deadlock.
#pragma once

#include "cuda/copy.cuh"

namespace fastsr::cuda::hopper {

struct alignas(8) Barrier {
  int32_t bytes;  // announced and not yet written
  uint32_t count : 15, pending : 15, phase : 1, unset : 1;  // shared memory is filled with ones

  void init(uint32_t arrivals) {
    if (arrivals < 1 || arrivals > 0x7fff) simt::fail("mbarrier.init: a count of ", arrivals);
    simt::running->check_shared("mbarrier.init", this, 8, 8);
    bytes = 0, count = pending = arrivals, phase = 0, unset = 0;
  }
  void arrive() { arrive_expecting(0); }
  void arrive_expecting(uint32_t expected) {
    simt::running->give_way();
    check("mbarrier.arrive");
    if (pending == 0) simt::fail("mbarrier.arrive: more arrivals than the barrier counts");
    bytes += static_cast<int32_t>(expected), pending = pending - 1;
    advance();
  }
  void wait(uint32_t parity) {
    simt::running->give_way();
    check("mbarrier.try_wait");
    while (phase == (parity & 1)) simt::running->park("mbarrier.try_wait", this);
  }
  // A copy has written `done` bytes.
  void complete(uint32_t done) {
    check("a bulk copy");
    bytes -= static_cast<int32_t>(done);
    advance();
  }

 private:
  void check(const char* what) const {
    if (unset) simt::fail(what, ": the barrier was not initialised");
  }
  void advance() {
    if (pending != 0 || bytes != 0) return;
    phase = phase ^ 1, pending = count;
    simt::running->wake(this);
  }
};

inline void fence_barriers() {}
inline void fence_async_proxy() {}

}  // namespace fastsr::cuda::hopper
