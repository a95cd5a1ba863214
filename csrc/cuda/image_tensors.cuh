// Torch's tensors as the views that the convolutions read and write.
#pragma once

#include "cuda/conv3x3_engine.cuh"
#include "cuda/tensors.cuh"

namespace fastsr::cuda {

// run(Products(), T()): how convolutions of x are computed, and with what elements. float32 is rounded to tf32 where the caller may.
template <class Run>
void with_products(const Tensor& x, bool tf32, const char* op, Run run) {
  with_element_type(x, op, [&]<class T>(T element) {
    if constexpr (std::is_same_v<T, float>) {
      if (tf32) return run(TensorCores{}, element);
    }
    run(ExactProducts<T>{}, element);
  });
}

// Pictures whose channels lie side by side.
template <class T>
ImageView<const T> image_view(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), {t.stride(0), t.stride(2), t.stride(3)}};
}

template <class T>
ImageView<T> mutable_image_view(const Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), {t.stride(0), t.stride(2), t.stride(3)}};
}

}  // namespace fastsr::cuda
