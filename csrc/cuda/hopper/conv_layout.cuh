// Where a 3x3 convolution by wgmma finds its operands, as plain arithmetic that host and device share.
//
// A product is 64 x N x 32 bytes of channels: weights are its rows, pixels its columns. N = 8 BLOCKS pixels are a strip, 8 pixels along
// w and BLOCKS blocks down, read where the halo tile lies: blocks follow each other at a fixed distance, and a tap is another first pixel.
//
//     halo tile, unswizzled: [unit of 16 bytes][pixel]         a strip            filters in shared memory: [unit of 16 bytes][row]
//       +-- WIDTH = 8 STRIPS + 2 --+                            | 8 px |
//       | .  .  .  .  .  .  .  . . |   tap (dh, kw) begins      +------+  block 0      GROUPS = 1     W2 W1 W0 | W2 W1 W0 | W2 W1 W0
//       | .  +------+------+     . |   at pixel                 +------+  block 1      GROUPS = 2   0 W2 W1 W0 0 W2 W1 W0 0 W2 W1 W0 0
//       | .  | strip|      |     . |   dh WIDTH + 8 strip + kw  +------+  ...            a letter is 64 / GROUPS rows: kernel row of one kw
//
// With 32 outputs a product's 64 rows hold two rows of pixels: block b is the pixel rows 2b and 2b + 1, which read the halo rows
// 2b + dh, dh = 0 .. 3. Rows 0..31 of the product take kernel row dh, rows 32..63 kernel row dh - 1, and zeros where there is none; the
// order above makes that 64 rows which follow each other. So 12 products do the work of 18: 75% of the full rate, against 50% for rows
// of zeros. Pairing two convolutions of a dense block (M = 64 for their common inputs) would reach 93%, but has to keep float32
// sums of the second in memory: 256 bytes a pixel for the first pair, beside the 448 that the two convolutions move.
#pragma once

#include "cuda/hopper/layout.cuh"

namespace fastsr::cuda::hopper {

constexpr int kUnitBytes = 16, kStageUnits = 4;  // a stage holds 64 bytes of channels, two steps of K
constexpr int kStageBytes = kUnitBytes * kStageUnits;
constexpr int kStrip = 8;                        // pixels along w: the rows of a block of a matrix descriptor
constexpr int kProductRows = 64;

// The filters of 64 / groups outputs: how many rows, and where those of a product begin.
struct FilterStack {
  int groups;
  constexpr int outputs() const { return kProductRows / groups; }
  constexpr int shifts() const { return groups + 2; }  // dh = 0 .. groups + 1
  constexpr int rows() const { return (3 * shifts() + groups - 1) * outputs(); }
  constexpr int first_row(int dh, int kw) const { return (kw * shifts() + groups + 1 - dh) * outputs(); }

  struct Row {
    int kh, kw;  // kh > 2, kw > 2: zeros
    int output;  // within the stack
  };
  // What row of shared memory `row` holds. A thread's accumulators of rows r and r + 8 are neighbouring channels.
  constexpr Row at(int row) const {
    const int block = row / outputs(), within = row % outputs();
    return {groups + 1 - block % shifts(), block / shifts(), within / 16 * 16 + within % 8 * 2 + within / 8 % 2};
  }
  // The descriptor of the 64 rows of a product, K step 0 or 1; `address` is that of the stage's filters.
  constexpr uint64_t descriptor(uint32_t address, int dh, int kw, int step) const {
    const uint32_t unit = rows() * kUnitBytes;
    return matrix_descriptor(Swizzle::none, address + first_row(dh, kw) * kUnitBytes + step * 2 * unit, kStrip * kUnitBytes, unit);
  }
};

// A stage's pixels: HEIGHT rows of WIDTH, as TMA leaves them. Swizzled (span64), a pixel's 64 bytes lie side by side.
template <int WIDTH, int HEIGHT, Swizzle SWIZZLE>
struct HaloLayout {
  static_assert(SWIZZLE == Swizzle::none || SWIZZLE == Swizzle::span64);
  static constexpr bool planes = SWIZZLE == Swizzle::none;
  static constexpr int pixels = WIDTH * HEIGHT, box_bytes = pixels * kStageBytes;
  static constexpr int alignment = planes ? 128 : static_cast<int>(block_bytes(SWIZZLE));
  static constexpr int bytes = (box_bytes + alignment - 1) / alignment * alignment;

  // Byte 0 of a unit, from the start of the stage.
  static constexpr uint32_t place(int pixel, int unit) {
    return planes ? (unit * pixels + pixel) * kUnitBytes : tile_place(SWIZZLE, pixel, unit * kUnitBytes);
  }
  // The descriptor of blocks of 8 pixels from `pixel` on, `groups` rows of pixels apart, K step 0 or 1.
  static constexpr uint64_t descriptor(uint32_t address, int pixel, int step, int groups) {
    constexpr uint32_t kPixel = planes ? kUnitBytes : kStageBytes;
    const uint32_t along_k = planes ? 2 * pixels * kUnitBytes : 2 * kUnitBytes;
    return matrix_descriptor(SWIZZLE, address + pixel * kPixel + step * along_k, groups * WIDTH * kPixel, pixels * kUnitBytes);
  }
};

}  // namespace fastsr::cuda::hopper
