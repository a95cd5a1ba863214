// Host twin of csrc/cuda/hopper/tensor_map.cuh.
#pragma once

#include "cuda/hopper/tma.cuh"

namespace fastsr::cuda::hopper {

template <class T, int DIMS>
CUtensorMap tensor_map(const T* data, const int64_t (&sizes)[DIMS], const int64_t (&strides)[DIMS - 1], const int (&box)[DIMS], Swizzle swizzle) {
  if (reinterpret_cast<uintptr_t>(data) % 16) simt::fail("a tensor map of data at no multiple of 16");
  CUtensorMap map{reinterpret_cast<const unsigned char*>(data), DIMS, sizeof(T), {}, {1}, {}, swizzle};
  for (int i = 0; i < DIMS; ++i) {
    map.sizes[i] = sizes[i], map.box[i] = box[i];
    if (sizes[i] < 1 || box[i] < 1 || box[i] > 256) simt::fail("a tensor map of size ", sizes[i], " in boxes of ", box[i]);
    if (i == 0) continue;
    map.strides[i] = strides[i - 1];
    if (strides[i - 1] < 1 || strides[i - 1] * sizeof(T) % 16) simt::fail("a tensor map of stride ", strides[i - 1]);
  }
  if (box[0] * sizeof(T) % 16) simt::fail("a box whose rows are no multiple of 16 bytes");
  return map;
}

}  // namespace fastsr::cuda::hopper
