// Where the rows of a tensor lie whose channels are side by side.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fastsr::cpu {

// A tensor's pixels: where they lie, in elements. Null data stands for no tensor.
struct Plane {
  char* data = nullptr;
  int64_t n = 0, h = 0, w = 0;

  Plane() = default;
  explicit Plane(const torch::stable::Tensor& t)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), n(t.stride(0)), h(t.stride(2)), w(t.stride(3)) {}
  char* row(int64_t image, int64_t y, int64_t size) const { return data ? data + (image * n + y * h) * size : nullptr; }
  Plane from_channel(int64_t c, int64_t size) const {
    Plane p = *this;
    p.data += c * size;
    return p;
  }
};

}  // namespace fastsr::cpu
