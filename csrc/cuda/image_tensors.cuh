// Torch's tensors as the views that the convolutions read and write.
#pragma once

#include "cuda/conv3x3_engine.cuh"
#include "cuda/tensors.cuh"

namespace fastsr::cuda {

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
