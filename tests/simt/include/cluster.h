// The blocks of a cluster: each in a system thread of its own, whose thread-local data are its shared variables. One runs at a time,
// until it waits at a cluster barrier or ends; the order is drawn anew after each barrier.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

namespace simt {

class Block;

class Cluster {
 public:
  Cluster(int blocks, uint64_t seed) : random_(seed + 1), blocks_(blocks), order_(blocks) {
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), random_);
  }
  // Returns once all have joined and it is this block's turn.
  void join(int rank, Block* block) {
    std::unique_lock lock(mutex_);
    blocks_[rank] = block;
    joined_ += 1;
    wake_.notify_all();
    wake_.wait(lock, [&] { return joined_ == static_cast<int>(blocks_.size()) && order_[turn_] == rank; });
  }
  // Lets the others run; returns at this block's next turn.
  void wait(int rank) {
    std::unique_lock lock(mutex_);
    next();
    wake_.wait(lock, [&] { return order_[turn_] == rank; });
  }
  void leave(int rank) {
    std::lock_guard lock(mutex_);
    blocks_[rank] = nullptr;
    next();
  }
  // Null for one that has ended.
  Block* block(int rank) const { return blocks_[rank]; }
  int size() const { return static_cast<int>(blocks_.size()); }

 private:
  void next() {
    if (++turn_ == order_.size()) {
      std::erase_if(order_, [&](int rank) { return blocks_[rank] == nullptr; });
      std::shuffle(order_.begin(), order_.end(), random_);
      turn_ = 0;
    }
    wake_.notify_all();
  }

  std::minstd_rand random_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Block*> blocks_;
  std::vector<int> order_;
  size_t turn_ = 0;
  int joined_ = 0;
};

}  // namespace simt
