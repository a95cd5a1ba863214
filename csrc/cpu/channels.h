// Sums, dot products and scalings over channels that lie side by side: what stands around the convolutions of a gated block.
//
// This header is read by the translation units of each instruction set: no inline code here (see conv_engine.h).
#pragma once
#include <cstdint>

#include "cpu/conv_engine.h"

namespace fastsr::cpu {

struct ChannelKernel {
  // to[0], to[1], to[2][channels] = the sum of a row's pixels [0, width - 1), [0, width), [1, width): what the left, middle and
  // right taps of a 3x3 convolution see of it. By the row's Element; `pixel` elements from a pixel to the next.
  void (*sum_row[3])(const void* row, int64_t pixel, int64_t width, int64_t channels, float* to);
  // to[i] = the dot product of a's row i, `length` values, with b + i * b_row. By a's Element.
  void (*dots[3])(const void* a, const float* b, int64_t b_row, int64_t rows, int64_t length, float* to);
  // sums[i] += s * a[i] + t * b[i]
  void (*accumulate)(float* sums, float s, const float* a, float t, const float* b, int64_t length);
  // to[p][c] = scale[c] * from[p][c] + shift[c]. By from's Element and that of `to`, float32 or bfloat16 (from bfloat16 alone).
  void (*scale_row[3][2])(const void* from, int64_t from_pixel, const float* scale, const float* shift, int64_t pixels, int64_t channels,
                          void* to, int64_t to_pixel);
};

const ChannelKernel& choose_channel_kernel();

namespace portable { extern const ChannelKernel channels; }
#if defined(__x86_64__)
namespace avx2 { extern const ChannelKernel channels; }
namespace avx512 { extern const ChannelKernel channels; }
#endif

}  // namespace fastsr::cpu
