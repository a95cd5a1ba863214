// Work shared out over threads, so that none waits long for another.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace fastsr::cpu {

// Items [first, last), shared out: each thread has a part of its own, for what its caches hold, and when that is done takes from the others'.
// Where one thread is held up (by another process, or an interrupt), the rest waits for one step of it at most, not for its whole part.
class Shares {
 public:
  Shares(int64_t first, int64_t last, int64_t count, int64_t step) : step_(step), parts_(count) {
    for (int64_t i = 0; i < count; ++i) {
      parts_[i].next = first + (last - first) * i / count;
      parts_[i].end = first + (last - first) * (i + 1) / count;
    }
  }

  int64_t count() const { return static_cast<int64_t>(parts_.size()); }

  // Calls work(begin, end) for steps of the part `own`, then of the parts behind it, until none is left.
  template <class Work>
  void take(int64_t own, const Work& work) {
    for (int64_t i = 0; i < count(); ++i) {
      Part& part = parts_[(own + i) % count()];
      for (int64_t begin; (begin = part.next.fetch_add(step_, std::memory_order_relaxed)) < part.end;) work(begin, std::min(begin + step_, part.end));
    }
  }

 private:
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t step_;
  std::vector<Part> parts_;
};

}  // namespace fastsr::cpu
