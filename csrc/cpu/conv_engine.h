// The engine of every 3x3 convolution on a CPU: one row of one image at a time, on any instruction set.
//
//     rows y-1, y, y+1 of the input           packed weights             one row of the output
//     [pixel][channel prefix]          *      [group][dy][c][dx][o]  ->  [pixel][channel slice]
//
// An operator packs its weights and walks the rows in any order it likes (conv_driver.h): per row it asks a `RowInput` for
// the three rows above, at and below, and hands a few rows at a time to the kernel's `rows`. No border is asked of any buffer.
// A pixel's summation order is fixed by the kernel and the number of input channels alone: not by the picture's shape, the
// segment or the thread.
//
// This header is read by the translation units of each instruction set: it holds no inline code, of which the
// linker might keep the copy that needs the newest processor.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastsr::cpu {

enum class Element : int { f32, bf16, f16 };

// What follows the sum v of a pixel: u = v + bias; then u = act(u), or u = mask > 0 ? u : slope * u where a mask is given;
// then y = scale * gate[o] * u + skip; then y = scale2 * y + skip2 where a second skip is given.
struct Epilogue {
  float slope = 1.f;  // of the activation: 1 is none, 0 is ReLU
  float scale = 1.f, scale2 = 1.f;
  const float* gate = nullptr;  // of each output channel, padded as the bias; null stands for 1
  const void* mask = nullptr;  // column 0, first channel of the slice, of this row; null for none
  const void* skip = nullptr;
  const void* skip2 = nullptr;
  int64_t mask_pixel = 0, skip_pixel = 0, skip2_pixel = 0;  // elements from a pixel to the next
  // Where the channels of a pixel go (and where `skip` has them), in elements; null where they lie side by side.
  const int64_t* out_lanes = nullptr;
  const int64_t* skip_lanes = nullptr;
};

// Weights and bias in the order in which a kernel reads them (see `pack`).
struct PackedConv {
  const char* weights = nullptr;  // [group][tap row][channels / u][tap column][output channels of the group][u], u = 4 / operand's size
  bool abreast = false;           // instead [tap row][channels / u][a vector: tap column, output channel][u]
  const float* bias = nullptr;    // [output channels, padded to whole groups]
  const void* zeros = nullptr;    // a pixel's worth
  int64_t cin = 0;                // padded to the kernel's unit
  int64_t cout = 0;
};

// One row of one image: out[column] for begin <= column < end, begin < end.
struct RowJob {
  const void* x[3];  // column 0 of the rows above, at and below; null outside the image
  int64_t x_pixel;   // elements from a pixel to the next
  // For kernels that `gather`: copies of the kEdge pixels from column -1 on and of those up to column `width`, x_pixel apart and
  // zeros included; null if the row itself may be read from column -1 to max(width, kEdge).
  const void* left[3];
  const void* right[3];
  // Column 0 of a row of which `begin` to `end`, as many channels as the input has, are fetched into the cache meanwhile; or null.
  const void* ahead;
  int64_t ahead_pixel;
  bool cold;  // what the epilogue reads and writes lies in no cache: fetch it, too
  int64_t width;      // of the row: columns -1 and `width` are zero
  int64_t begin, end;
  const PackedConv* conv;
  void* out;           // column 0, first channel of the slice
  int64_t out_pixel;
  Epilogue epilogue;
};

constexpr int64_t kEdge = 16;  // pixels of an AMX tile

// One way to compute a row, compiled for one instruction set.
struct Kernel {
  const char* name;
  Element operand;     // of the input rows and weights that it reads
  int lanes, vectors;  // output channels of a vector, vectors of a group
  int unit;            // the number of input channels is padded to a multiple of it
  int few;             // up to so many output channels have their weights abreast
  void (*rows[3])(const RowJob* jobs, int64_t count);          // of one convolution, in order; by the Element of output, mask and skips
  void (*read[3])(const void* from, void* to, int64_t count);  // turns values of an Element into operands
  // Only of kernels that read tiles of kEdge pixels with the zeros at the row's ends: lays `count` operand pixels of a padded
  // number of channels, `stride` bytes apart.
  void (*gather)(const char* from, int64_t stride, char* to, int64_t bytes, int64_t count);
};

namespace portable { extern const Kernel float32; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernel float32; }
namespace avx512 { extern const Kernel float32; }
namespace avx512_bf16 { extern const Kernel bfloat16; }
namespace amx { extern const Kernel bfloat16; }
#endif

}  // namespace fastsr::cpu
