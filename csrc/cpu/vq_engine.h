// The nearest-code search's kernels, one table per instruction set. vq_kernel.h holds their text, vq_search.cpp calls them.
//
// This header is read by the translation units of each instruction set: it holds no inline code, of which the
// linker might keep the copy that needs the newest processor.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/conv_engine.h"

namespace fastsr::cpu {

// Where some rows of x or of a codebook lie: channel c of row i is element offsets[i] + c * channel.
struct RowView {
  const void* data;
  const int64_t* offsets;
  int64_t count;    // of rows
  int64_t channel;  // elements from a channel to the next
  bool adjacent;    // each row lies one element after the one before
};

// Codes packed for products: tile t holds `codes` codes (see VqKernel) as [channel][code], negated; `half` is |e|^2 / 2.
struct PackedCodes {
  const float* values;
  const float* half;
  int64_t tiles;
  int64_t first;  // the number of the first tile
};

struct Ahead {
  const char* data;
  int64_t bytes;
};

// The codes within a row's limit, in any order; more than fit are only counted.
struct Candidates {
  static constexpr int64_t kMost = 64;
  float limit;
  int64_t count;
  int32_t codes[kMost];
};

struct Nearest {
  int64_t index;
  double distance;
};

struct VqKernel {
  const char* name;
  int rows, codes;      // of a register tile
  int state;            // floats that a row of `scan` needs
  int roundings;        // of a product and its sum: 1 where they are fused
  // The mean of some columns of contiguous codes, and the largest magnitude in them: infinite if one is not finite.
  float (*mean[3])(const void* codes, int64_t count, int64_t channels, int64_t first, int64_t columns, float* mean);
  // (x - mean) * scales[i] as [channel][rows], zeros beyond the last row, and each row's sum of squares.
  void (*pack_rows[3])(const RowView& x, int64_t channels, const float* mean, const float* scales, float* to, float* squares);
  // A tile of codes in the same way, negated; half of a code that does not exist is infinite.
  void (*pack_codes[3])(const RowView& codes, int64_t channels, const float* mean, const float* scales, float* to, float* half);
  void (*reset)(float* state);  // of `rows` rows
  // Scores half - x . e of a group of rows against some tiles: keep the best two of each lane. `ahead` is memory that will be read
  // next, asked for a little with each tile: all at once it would hold up the codes.
  void (*scan)(const float* x, const PackedCodes& codes, int64_t channels, float* state, Ahead ahead);
  // Of each row the smallest score, the next one, and the first one's code.
  void (*finish)(const float* state, float* first, float* second, int64_t* index);
  // The codes of one row of `state` within its limit; false if there may be more than its lanes have kept.
  bool (*kept)(const float* state, Candidates* row);
  // The same scores again: the codes with at most each row's limit.
  void (*collect)(const float* x, const PackedCodes& codes, int64_t channels, Candidates* rows);

  // The float64 distances that define the answer; codes lie one after the other. A norm of 0 stands for no division by it.
  void (*widen[3])(const void* row, int64_t channel, int64_t channels, double norm, double* to);  // zeros up to a multiple of 8
  double (*norm)(const double* row, int64_t channels);
  double (*distance[3])(const double* row, const void* code, int64_t channels, double norm);
  Nearest (*nearest[3])(const double* row, const void* codes, int64_t count, int64_t channels, const double* norms);  // norms may be null
};

namespace portable { extern const VqKernel vq; }
#if defined(__x86_64__)
namespace avx2 { extern const VqKernel vq; }
namespace avx512 { extern const VqKernel vq; }
#endif

}  // namespace fastsr::cpu
