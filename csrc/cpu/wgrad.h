// Weight gradients of 3x3 convolutions on a CPU, all convolutions of a block in one call.
#pragma once
#include <cstdint>

#include "cpu/conv_engine.h"

namespace fastsr::cpu {

// A picture whose channels lie side by side.
struct GradientView {
  const void* data;
  int64_t n, h, w;  // strides of image, row and pixel in elements
};

struct WeightGradient {  // of one convolution
  GradientView x, g;     // its input (a channel prefix), the gradient of its output (a channel slice)
  int64_t cin, cout;
  void* dweight;  // (cout, cin, 3, 3) contiguous, overwritten
  void* dbias;    // (cout,) or null
  bool wide = false;  // the results are float32, whatever the tensors' type
};

// dweight[o][c][i][j] = scale * sum over n, y, x of g[n][y][x][o] * x[n][y + i - 1][x + j - 1][c], with x zero outside the image;
// dbias[o] = scale * sum of g[n][y][x][o]. All tensors are of `type` (see `wide`); sums are in float32. Runs on torch's threads, whose
// number does not change a bit of the result.
void weight_gradients(const WeightGradient* convs, int count, int64_t batch, int64_t height, int64_t width, Element type, float scale);

}  // namespace fastsr::cpu
