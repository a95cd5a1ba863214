// Parameters of an operator in the element type of its pictures or, as autocast leaves them, in float32.
#pragma once

#include <cstdint>

#include "cuda/numeric.cuh"

namespace fastsr::cuda {

// Values that are read as T, rounded where they are wider: what casting them beforehand would give, bit for bit. May be null.
template <class T>
struct Parameter {
  const void* data;
  bool wide;  // float32
  static __host__ __device__ Parameter of(const T* values) { return {values, false}; }
  __host__ __device__ Parameter from(int64_t element) const {
    return {static_cast<const char*>(data) + element * (wide ? 4 : static_cast<int64_t>(sizeof(T))), wide};
  }
  __device__ __forceinline__ T operator[](int64_t i) const {
    return wide ? from_float<T>(static_cast<const float*>(data)[i]) : static_cast<const T*>(data)[i];
  }
};

// visit(W()) with the type in which gradients of such parameters are stored.
template <class T, class Visit>
void with_gradient_type(bool wide, Visit visit) {
  wide ? visit(float()) : visit(T());
}

}  // namespace fastsr::cuda
