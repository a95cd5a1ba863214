// Walks a chain of convolutions as a wavefront, in segments of columns that stay in L2.
//
//            columns   c0         c1              Rows: stage k does row r - k when stage 0 does row r, so a row is read again
//     stage 0    ......|##########|......         while it is still in L2. Each thread has a strip of rows and computes the few
//     stage 1    .....|##########|.......         rows that its stages need beyond it once more (K - 1 - k rows on each side for
//     stage 2    ....|##########|........         stage k): no thread waits for another.
//
//     Columns: a segment of stage k ends k columns before that of stage 0, where the stage before has done all that it reads, and
//     begins where the segment before has ended: within a strip nothing is computed twice.
//
// Whole buffer   (training) is written where it lies.
// Kept rows      (inference) Each thread has K + 2 rows of a segment in a ring, and copies the input's rows into it. The last K columns
//                of each row of the strip are kept for the next segment. So only the chain's input and output pass through memory.
// A value does not depend on who computes it, nor on the segment.
//
// predicted / measured, dense block of 64 features and 4 x 32 growths in float32, share of one core's FMA roof, one thread, 256 x 256:
//   v1 whole rows (7 x 196 KB and 0.96 MB of weights in an L2 of 2 MB)      - / 84-86%
//   v2 segments of 96 columns in the whole buffer                          90% / 87-89%
//   v3 kept rows, segments of 60 columns (this file)                       93% / 90-92%; the kernel alone, all in L2: 95%
#include "cpu/chain.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

namespace fastsr::cpu {
namespace {

constexpr int64_t kSegmentBytes = 330 << 10;  // of the rows in use; as much again and more are weights
constexpr int64_t kMostStages = 16;           // of a chain that is cut into segments

class Walker {
 public:
  explicit Walker(const Chain& chain) : chain_(chain) {
    static thread_local Memory memory;
    memory_ = &memory;
    if (memory.inputs.size() < chain.stages.size()) memory.inputs.resize(chain.stages.size());
    together_ = rows_at_a_time(chain.width);
    ring_rows_ = stages() + 1 + together_;
    pixel_ = (kept() ? chain.channels : chain.buffer.w) * chain.size();
    choose_segments();
  }

  // Rows [lo, hi) of image n.
  void strip(int64_t n, int64_t lo, int64_t hi) {
    n_ = n, lo_ = lo, hi_ = hi;
    for (begin_ = 0; begin_ < chain_.width; begin_ = end_) {
      end_ = chain_.width - begin_ < 2 * segment_ ? chain_.width : begin_ + segment_;
      walk_segment();
    }
  }

 private:
  struct Memory {
    Buffer ring, columns;
    std::vector<Buffer> inputs;
  };

  int64_t stages() const { return static_cast<int64_t>(chain_.stages.size()); }
  int64_t last() const { return stages() - 1; }
  bool kept() const { return !chain_.buffer.data; }

  void choose_segments() {
    const int64_t unit = chain_.kernel.gather ? 3 * kEdge : 12;  // pixels that the kernels like
    const int64_t most = std::max<int64_t>(48, kSegmentBytes / (ring_rows_ * chain_.channels * chain_.size()) / unit * unit);
    const int64_t count = (chain_.width + most / 2) / most;
    segment_ = count < 2 ? chain_.width : chain_.width / count / unit * unit;
    std::vector<RowInput> inputs = make_inputs(nullptr);
    const bool whole = std::any_of(inputs.begin(), inputs.end(), [](const RowInput& input) { return !input.in_place(); });
    if (whole || stages() > kMostStages) segment_ = chain_.width;
  }

  std::vector<RowInput> make_inputs(const char* buffer) const {
    std::vector<RowInput> inputs;
    for (int64_t k = 0; k < stages(); ++k) {
      RowInput::Layout layout{buffer, chain_.type, chain_.buffer.n, chain_.buffer.h, chain_.buffer.w, chain_.stages[k].inputs,
                              chain_.height, chain_.width, 1};
      if (kept()) layout.n = 0, layout.h = ring_row_, layout.w = chain_.channels, layout.rows = ring_rows_;
      inputs.emplace_back(chain_.kernel, layout, together_, memory_->inputs[k]);
    }
    return inputs;
  }

  // Column 0 of row y of the buffer.
  char* row(int64_t y) const { return kept() ? base_ + y % ring_rows_ * ring_row_ * chain_.size() : chain_.buffer.row(n_, y, chain_.size()); }

  void walk_segment() {
    const int64_t first = std::max<int64_t>(0, lo_ - last()), size = chain_.size();
    input_begin_ = std::max<int64_t>(0, first - 1), input_end_ = std::min(chain_.height, hi_ + last() + 1);
    if (kept()) {
      // AMX reads whole tiles, which may begin before the segment.
      const int64_t origin = std::max<int64_t>(0, begin_ - stages() - kEdge - 1), columns = std::min(chain_.width, end_ + 1) - origin;
      ring_row_ = columns * chain_.channels;
      base_ = static_cast<char*>(memory_->ring.reserve(ring_rows_ * ring_row_ * size)) - origin * pixel_;
      columns_ = static_cast<char*>(memory_->columns.reserve((input_end_ - input_begin_) * stages() * pixel_));
    }
    std::vector<RowInput> inputs = make_inputs(kept() ? base_ : chain_.buffer.data);
    int64_t taken = input_begin_, stored = input_begin_;
    for (int64_t r = first; r < hi_ + last(); r += together_) {
      if (kept()) {
        for (; taken < std::min(r + together_ + 1, input_end_); ++taken) take_row(taken);
      }
      for (int64_t k = 0; k < stages(); ++k) run_stage(inputs[k], k, r);
      if (kept() && end_ < chain_.width) {
        for (; stored < std::min(r + together_ + 1 - last(), input_end_); ++stored) store_columns(stored);
      }
    }
    if (kept() && end_ < chain_.width) {
      for (; stored < input_end_; ++stored) store_columns(stored);
    }
  }

  void run_stage(RowInput& input, int64_t k, int64_t r) const {
    const Stage& s = chain_.stages[k];
    const int64_t size = chain_.size(), beyond = last() - k, from = std::max({r - k, lo_ - beyond, int64_t{0}});
    const int64_t to = std::min({r - k + together_, hi_ + beyond, chain_.height});
    RowJob jobs[kRows];
    for (int64_t y = from; y < to; ++y) {
      RowJob& job = jobs[y - from] = {};
      job.begin = begin_ == 0 ? 0 : begin_ - k, job.end = end_ == chain_.width ? end_ : end_ - k;
      input.set(job, n_, y);
      // The stages before are yet to write the next row; the ring's is copied from the input.
      if (k > 0) job.ahead = nullptr;
      if (k == 0 && kept()) {
        job.ahead = y + 1 + together_ < input_end_ ? chain_.input.row(n_, y + 1 + together_, size) : nullptr;
        job.ahead_pixel = chain_.input.w;
      }
      job.cold = s.out.data || !kept();
      job.conv = &s.conv;
      job.out = s.out.data ? s.out.row(n_, y, size) : row(y) + s.inputs * size;
      job.out_pixel = s.out.data ? s.out.w : pixel_ / size;
      Epilogue& e = job.epilogue;
      e.slope = s.slope, e.scale = s.scale, e.scale2 = s.scale2;
      e.mask = s.mask.row(n_, y, size), e.mask_pixel = s.mask.w;
      e.skip = s.skip_input ? row(y) : s.skip.row(n_, y, size), e.skip_pixel = s.skip_input ? pixel_ / size : s.skip.w;
      e.skip2 = s.skip2.row(n_, y, size), e.skip2_pixel = s.skip2.w;
    }
    if (from < to) chain_.kernel.rows[static_cast<int>(chain_.type)](jobs, to - from);
  }

  char* stored_columns(int64_t y) const { return columns_ + (y - input_begin_) * stages() * pixel_; }

  // Row y of the input into the ring, and what the segment before has left of it.
  void take_row(int64_t y) const {
    const int64_t bytes = chain_.stages[0].inputs * chain_.size(), stride = chain_.input.w * chain_.size();
    char* to = row(y) + begin_ * pixel_;
    if (begin_ > 0) {
      std::memcpy(to - stages() * pixel_, stored_columns(y), stages() * pixel_);
      const char* next = stored_columns(y + 1 < input_end_ ? y + 1 : y);
      for (int64_t b = 0; b < stages() * pixel_; b += 64) __builtin_prefetch(next + b, 1);
    }
    const char* from = chain_.input.row(n_, y, chain_.size()) + begin_ * stride;
    const int64_t count = std::min(chain_.width, end_ + 1) - begin_;
    for (int64_t i = 0; i < count; ++i, from += stride, to += pixel_) std::memcpy(to, from, bytes);
  }

  void store_columns(int64_t y) const { std::memcpy(stored_columns(y), row(y) + (end_ - stages()) * pixel_, stages() * pixel_); }

  const Chain& chain_;
  Memory* memory_;
  int64_t together_, ring_rows_, segment_;
  int64_t pixel_, ring_row_ = 0;           // bytes of a pixel of the buffer; elements of a row of the ring
  int64_t n_, lo_, hi_, begin_, end_;      // the strip and its segment
  int64_t input_begin_, input_end_;        // rows that the strip reads
  char *base_ = nullptr, *columns_ = nullptr;
};

}  // namespace

void walk(const Chain& chain) {
  const int64_t rows = chain.batch * chain.height, strips = std::min<int64_t>(rows, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    Walker walker(chain);
    for (int64_t row = rows * begin / strips, stop = rows * end / strips; row < stop;) {
      const int64_t n = row / chain.height, lo = row % chain.height, hi = std::min(chain.height, lo + stop - row);
      walker.strip(n, lo, hi);
      row += hi - lo;
    }
  });
}

}  // namespace fastsr::cpu
