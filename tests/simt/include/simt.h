// Runs a CUDA kernel's own text on the CPU: one fiber per thread, blocks one after another.
//
// A fiber gives way at barriers, warp-wide operations and atomics only; who goes on is drawn from a seed. In half of the
// blocks the draw is fair, in the other half one warp runs ahead as far as the barriers let it, which is what shows a
// missing one. Shared memory is filled with 0xFF bytes (NaN, -1) before each block, so that uninitialised reads show.
// A warp-wide operation happens once all lanes of its mask have arrived; a block in which nobody can go on is an error.
#pragma once

#include <link.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "cluster.h"
#include "fiber.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xFF;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  int warp = 0, lane = 0;
  const char* waits_at = nullptr;
  bool done = false;
  std::vector<Copy> open;                  // copies since the last commit
  std::vector<std::vector<Copy>> groups;   // committed, oldest first
  std::vector<std::function<void()>> products;                     // wgmma's, since the last commit
  std::vector<std::vector<std::function<void()>>> product_groups;  // committed, oldest first
};

// A warp-wide operation for which not all lanes have arrived yet.
struct Meeting {
  const char* name;
  uint32_t mask, arrived;
  std::array<void*, kWarp> slots;
};

struct Warp {
  std::vector<int> ready;  // threads that can go on
  std::vector<Meeting> meetings;
  unsigned priority = 0;
};

inline thread_local Block* running = nullptr;

// This thread's copy of the module's thread-local data, which is where `__shared__` variables live.
inline thread_local char statics_anchor;
struct Range {
  char* begin = nullptr;
  size_t bytes = 0;
  bool holds(const void* p, size_t n) const {
    const char* c = static_cast<const char*>(p);
    return bytes != 0 && c >= begin && c + n <= begin + bytes;
  }
};

inline Range static_shared() {
  statics_anchor = 1;  // touched: the thread's copy exists now
  Range found{&statics_anchor, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Range& range = *static_cast<Range*>(data);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& part = info->dlpi_phdr[i];
          char* begin = static_cast<char*>(info->dlpi_tls_data);
          if (part.p_type != PT_TLS || begin == nullptr) continue;
          if (range.begin < begin || range.begin >= begin + part.p_memsz) continue;
          range = {begin, part.p_memsz};
          return 1;
        }
        return 0;
      },
      &found);
  return found;
}

class Block {
 public:
  Block(unsigned blocks, int threads, int shared_bytes, uint64_t seed, std::function<void()> body)
      : grid{blocks}, size{static_cast<unsigned>(threads)}, shared_bytes_(shared_bytes), random_(seed), body_(std::move(body)),
        threads_(threads), warps_((threads + kWarp - 1) / kWarp), statics_(static_shared()) {
    void* memory = nullptr;
    if (shared_bytes > 0 && posix_memalign(&memory, 1024, shared_bytes) != 0) fail("out of memory");
    dynamic_.reset(static_cast<char*>(memory));
    for (int i = 0; i < threads; ++i) {
      threads_[i].index = {static_cast<unsigned>(i), 0, 0};
      threads_[i].warp = i / kWarp, threads_[i].lane = i % kWarp;
    }
  }

  void run(unsigned block) {
    index = {block, 0, 0};
    if (statics_.bytes) std::memset(statics_.begin, kPoison, statics_.bytes);
    if (shared_bytes_) std::memset(dynamic_.get(), kPoison, shared_bytes_);
    fair_ = random_() >> 8 & 1;  // the lowest bit of the first number is that of the seed
    at_barrier_ = {}, finished_ = 0, parked_.clear(), later_.clear();
    for (auto& warp : warps_) warp.ready.clear(), warp.meetings.clear(), warp.priority = static_cast<unsigned>(random_());
    for (int i = 0; i < count(); ++i) {
      Thread& t = threads_[i];
      t.done = false, t.waits_at = nullptr, t.open.clear(), t.groups.clear(), t.products.clear(), t.product_groups.clear();
      t.fiber.start(&Block::enter, this);
      warps_[t.warp].ready.push_back(i);
    }
    running = this;
    while (finished_ < count() && !error_) {
      if (fair_ && !later_.empty() && random_() % 4 == 0) run_later();
      while ((current_ = pick()) < 0 && !later_.empty()) run_later();
      if (current_ < 0) {
        report_deadlock(block);
        break;
      }
      threads_[current_].waits_at = nullptr;
      threads_[current_].fiber.resume();
    }
    running = nullptr;
    if (!error_ && !later_.empty()) fail("block ", block, " ended before ", later_.size(), " of its asynchronous copies");
    if (error_) std::rethrow_exception(error_);
  }

  // The cluster that this block is number `rank` of.
  void belong_to(Cluster& cluster, int rank) { cluster_ = &cluster, rank_ = rank; }
  int rank() const { return rank_; }

  Thread& self() { return threads_[current_]; }
  int count() const { return static_cast<int>(threads_.size()); }
  char* dynamic(int bytes) const {
    if (bytes != shared_bytes_) fail("the kernel uses ", bytes, " bytes of dynamic shared memory and was launched with ", shared_bytes_);
    return dynamic_.get();
  }

  // Checks an access that must lie in shared memory at a multiple of its alignment.
  void check_shared(const char* what, const void* p, size_t bytes, size_t alignment) const {
    if (reinterpret_cast<uintptr_t>(p) % alignment) fail(what, ": a shared address is not a multiple of ", alignment);
    if (!Range{dynamic_.get(), static_cast<size_t>(shared_bytes_)}.holds(p, bytes) && !statics_.holds(p, bytes)) {
      fail(what, ": an address is outside of the block's shared memory");
    }
  }

  // The place of `p` in the shared memory of another block of the cluster.
  const void* in_block(int rank, const void* p, size_t bytes) const {
    check_shared("mapa", p, bytes, bytes);
    if (cluster_ == nullptr || rank < 0 || rank >= cluster_->size()) fail("mapa: no block ", rank, " in the cluster");
    const Block* other = cluster_->block(rank);
    if (other == nullptr) fail("mapa: block ", rank, " of the cluster has ended");
    const auto* c = static_cast<const char*>(p);
    return statics_.holds(p, bytes) ? other->statics_.begin + (c - statics_.begin) : other->dynamic_.get() + (c - dynamic_.get());
  }

  // Addresses of dynamic shared memory as wgmma's descriptors hold them: 18 bits, the low ones those of the memory itself.
  uint32_t shared_address(const void* p) const { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p) & 0x3ffff); }
  const unsigned char* at_shared_address(uint32_t address) const {
    const auto* p = reinterpret_cast<const unsigned char*>(dynamic_.get()) + (address - shared_address(dynamic_.get()) & 0x3ffff);
    check_shared("wgmma", p, 16, 16);
    return p;
  }

  // Lets others run; this thread may be drawn again at once.
  void give_way() {
    warps_[self().warp].ready.push_back(current_);
    self().fiber.suspend();
  }

  // Suspends this thread until another one, or what was put off, wakes those who wait for `at`.
  void park(const char* name, const void* at) {
    self().waits_at = name;
    parked_.push_back({at, current_});
    self().fiber.suspend();
  }
  void wake(const void* at) {
    std::erase_if(parked_, [&](const auto& entry) {
      if (entry.first == at) warps_[threads_[entry.second].warp].ready.push_back(entry.second);
      return entry.first == at;
    });
  }

  // Puts an asynchronous action off: it happens between two steps of the threads, in any order among others; in half of the blocks not before
  // nobody else can go on.
  void later(std::function<void()> action) { later_.push_back(std::move(action)); }

  void barrier() { barrier(0, count()); }
  // Barrier `id` among `expected` threads.
  void barrier(int id, int expected) {
    int& arrived = at_barrier_[id];
    if (++arrived < expected) return park(id == 0 ? "__syncthreads" : "bar.sync", &arrived);
    arrived = 0;
    wake(&arrived);
    give_way();
  }

  // All threads of this block, then those of the others.
  void cluster_barrier() {
    if (cluster_ == nullptr) fail("barrier.cluster: launched without clusters");
    if (++at_cluster_barrier_ < count()) return park("barrier.cluster", cluster_);
    at_cluster_barrier_ = 0;
    cluster_->wait(rank_);
    wake(cluster_);
    give_way();
  }

  // Waits until all lanes of `mask` are here; the last one calls act(slots), each lane's slot being its `slot`.
  template <class Act>
  void meet(const char* name, uint32_t mask, void* slot, Act act) {
    Thread& me = self();
    Warp& warp = warps_[me.warp];
    const int lanes = std::min(kWarp, count() - me.warp * kWarp);
    if (lanes < kWarp) mask &= (1u << lanes) - 1;
    if (!(mask >> me.lane & 1)) fail(name, ": lane ", me.lane, " is not in its own mask");
    auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](const Meeting& m) { return m.mask & mask; });
    if (meeting == warp.meetings.end()) {
      warp.meetings.push_back({name, mask, 0, {}});
      meeting = std::prev(warp.meetings.end());
    }
    if (meeting->mask != mask || std::strcmp(meeting->name, name) != 0) {
      fail("lanes of one warp diverge: ", meeting->name, " and ", name, " with other masks or in another order");
    }
    meeting->arrived |= 1u << me.lane;
    meeting->slots[me.lane] = slot;
    if (meeting->arrived != mask) {
      me.waits_at = name;
      return me.fiber.suspend();
    }
    const auto slots = meeting->slots;
    warp.meetings.erase(meeting);
    act(slots);
    for (int lane = 0; lane < lanes; ++lane) {
      if (mask >> lane & 1 && lane != me.lane) warp.ready.push_back(me.warp * kWarp + lane);
    }
    give_way();
  }

  dim3 grid, size, index;

 private:
  static void enter(void* block) {
    Block& self = *static_cast<Block*>(block);
    try {
      self.body_();
      for (auto& group : self.self().groups) finish(group);
      finish(self.self().open);
    } catch (...) {
      self.error_ = std::current_exception();
    }
    self.self().done = true;
    ++self.finished_;
  }

  static void finish(const std::vector<Copy>& copies) {
    for (const Copy& c : copies) std::memcpy(c.to, c.from, c.bytes);
  }

  void run_later() {
    std::swap(later_[random_() % later_.size()], later_.back());
    const auto action = std::move(later_.back());
    later_.pop_back();
    try {
      action();
    } catch (...) {
      error_ = std::current_exception();
    }
  }

  int pick() {
    int chosen = -1, seen = 0;
    for (int w = 0; w < static_cast<int>(warps_.size()); ++w) {
      if (warps_[w].ready.empty()) continue;
      ++seen;
      if (chosen < 0 || (fair_ ? random_() % seen == 0 : warps_[w].priority > warps_[chosen].priority)) chosen = w;
    }
    if (chosen < 0) return -1;
    auto& ready = warps_[chosen].ready;
    std::swap(ready[random_() % ready.size()], ready.back());
    const int thread = ready.back();
    ready.pop_back();
    return thread;
  }

  void report_deadlock(unsigned block) {
    std::ostringstream text;
    text << "block " << block << ": no thread can go on;";
    std::vector<std::string> seen;
    for (const Thread& t : threads_) seen.push_back(t.done ? "have returned" : std::string("wait at ") + (t.waits_at ? t.waits_at : "?"));
    std::sort(seen.begin(), seen.end());
    for (auto it = seen.begin(); it != seen.end();) {
      auto next = std::upper_bound(it, seen.end(), *it);
      text << " " << next - it << " threads " << *it << ";";
      it = next;
    }
    error_ = std::make_exception_ptr(Error(text.str()));
  }

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  int shared_bytes_;
  std::minstd_rand random_;
  std::function<void()> body_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<std::pair<const void*, int>> parked_;
  std::vector<std::function<void()>> later_;
  Range statics_;
  std::unique_ptr<char, Free> dynamic_;
  std::exception_ptr error_;
  Cluster* cluster_ = nullptr;
  int rank_ = 0, at_cluster_barrier_ = 0;
  bool fair_ = true;
  int current_ = 0, finished_ = 0;
  std::array<int, 2> at_barrier_{};
};

// Reports of the undefined-behaviour sanitizer since the launch began (0 without the sanitizer).
inline int undefined_reports = 0;

// Calls of hopper::multiply, one for each thread of a warpgroup.
inline std::atomic<int64_t> wgmma_calls = 0;

// Stands in for the host launcher: the same call, on the CPU. The order of the blocks is drawn from the seed too.
struct Launcher {
  uint64_t seed = 0;
  bool on_hopper = false;  // as sm_90a: its kernels are taken, and a block has 227 KB of shared memory

  bool hopper() const { return on_hopper; }
  int multiprocessors() const { return 3; }

  template <class... Parameters>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, std::type_identity_t<Parameters>... arguments) const {
    if (blocks == 0) return;
    check(blocks, threads, shared_bytes);
    static std::mutex one_launch;
    std::lock_guard lock(one_launch);
    undefined_reports = 0;
    std::exception_ptr error;
    // A thread of its own: `__shared__` variables are thread-local, and nothing else of the process is in its copy of them.
    std::thread worker([&] {
      try {
        Block block(static_cast<unsigned>(blocks), threads, shared_bytes, seed * 2 + 1, [&] { kernel(arguments...); });
        std::vector<unsigned> order(blocks);
        std::iota(order.begin(), order.end(), 0u);
        std::shuffle(order.begin(), order.end(), std::minstd_rand(seed + 1));
        for (unsigned b : order) block.run(b);
      } catch (...) {
        error = std::current_exception();
      }
    });
    worker.join();
    if (error) std::rethrow_exception(error);
    if (undefined_reports) fail(undefined_reports, " reports of undefined behaviour (printed on stderr)");
  }

  // The same in clusters of `cluster` blocks.
  template <class... Parameters>
  void clustered(int cluster, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                 std::type_identity_t<Parameters>... arguments) const {
    if (blocks == 0) return;
    check(blocks, threads, shared_bytes);
    if (cluster < 1 || cluster > 8 || blocks % cluster) fail("a launch of ", blocks, " blocks in clusters of ", cluster);
    undefined_reports = 0;
    for (int64_t first = 0; first < blocks; first += cluster) {
      Cluster group(cluster, seed + first);
      std::vector<std::exception_ptr> errors(cluster);
      std::vector<std::thread> workers;
      for (int rank = 0; rank < cluster; ++rank) {
        workers.emplace_back([&, rank] {
          Block block(static_cast<unsigned>(blocks), threads, shared_bytes, (seed + rank) * 2 + 1, [&] { kernel(arguments...); });
          block.belong_to(group, rank);
          group.join(rank, &block);
          try {
            block.run(static_cast<unsigned>(first + rank));
          } catch (...) {
            errors[rank] = std::current_exception();
          }
          group.leave(rank);
        });
      }
      for (auto& worker : workers) worker.join();
      for (const auto& error : errors) {
        if (error) std::rethrow_exception(error);
      }
    }
    if (undefined_reports) fail(undefined_reports, " reports of undefined behaviour (printed on stderr)");
  }

 private:
  void check(int64_t blocks, int threads, int shared_bytes) const {
    if (blocks < 0 || blocks > std::numeric_limits<int32_t>::max()) fail("a launch of ", blocks, " blocks");
    if (threads < 1 || threads > 1024) fail("a launch of ", threads, " threads a block");
    const int most = (on_hopper ? 227 : 99) * 1024;  // 99 KB: sm_86, sm_89 and sm_120
    if (shared_bytes > most) fail("a launch with ", shared_bytes, " bytes of shared memory; expected at most ", most);
  }
};

}  // namespace simt

#include "device.h"
