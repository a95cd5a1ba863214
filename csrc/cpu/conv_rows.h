// The rows of some pictures through one convolution, shared out over torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/conv_driver.h"
#include "cpu/shares.h"

namespace fastsr::cpu {

// Rows [first, last) of all images' rows. `common` says what all have in common; `place(job, n, y)` sets where row y of image n
// writes and reads besides its input; `done(row, job)` follows for each, on the same thread, while what it wrote is in the cache.
template <class Place, class Done>
void convolve_rows(const Kernel& kernel, const RowInput::Layout& in, Element type, const RowJob& common, int64_t first, int64_t last, Place place,
                   Done done) {
  const int64_t height = in.height * in.upsample, width = in.width * in.upsample;
  const int64_t work = width * common.conv->cin * common.conv->cout * 9;  // multiply-adds of a row; a thread is worth waking for some 100,000
  const int64_t together = rows_at_a_time(width), grain = std::max(together, 100000 / work);
  Shares shares(first, last, std::clamp<int64_t>((last - first) / grain, 1, torch::stable::get_num_threads()), together);
  torch::stable::parallel_for(0, shares.count(), 1, [&](int64_t from, int64_t to) {
    thread_local Buffer memory;
    RowInput input(kernel, in, together, memory);
    RowJob jobs[kRows];
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end;) {
        int64_t count = 0;
        do {
          RowJob& job = jobs[count++] = common;
          job.begin = 0, job.end = width;
          input.set(job, row / height, row % height);
          place(job, row / height, row % height);
        } while (++row < end && row % height != 0);
        kernel.rows[static_cast<int>(type)](jobs, count);
        for (int64_t i = 0; i < count; ++i) done(row - count + i, jobs[i]);
      }
    };
    for (int64_t own = from; own < to; ++own) shares.take(own, run);
  });
}

}  // namespace fastsr::cpu
