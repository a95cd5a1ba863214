// csrc/cuda/vq_nearest.cuh on the CPU.
#include "module.h"

#include "cuda/vq_nearest.cuh"

namespace {

using namespace fastsr::cuda;

// x (outer, heads, depth, inner): address, sizes, strides; codebook (heads, codes, depth) without gaps. Returns the bytes of scratch memory.
template <class T>
int64_t search(uint64_t seed, uintptr_t x, const std::array<int64_t, 4>& size, const std::array<int64_t, 4>& strides, bool x_vectors,
            uintptr_t codebook, int codes, bool code_vectors, bool cosine, uintptr_t indices, uintptr_t distances, uintptr_t rescored,
            bool tensor_cores, bool hopper) {
  const Allocate allocate;
  const NearestCall<T> call{
      {pointer<const T>(x), size[3], strides[0], strides[1], strides[2], strides[3], x_vectors},
      {pointer<const T>(codebook), codes, static_cast<int>(size[2]), code_vectors},
      size[0] * size[3],
      cosine,
      {pointer<int64_t>(indices), pointer<float>(distances), pointer<unsigned long long>(rescored), size[3], static_cast<int>(size[1])}};
  find_nearest(call, simt::Launcher{seed, hopper}, allocate, tensor_cores);
  return allocate.total;
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, m) {
  m.def("float32", search<float>);
  m.def("bfloat16", search<__nv_bfloat16>);
  m.def("float16", search<__half>);
}
