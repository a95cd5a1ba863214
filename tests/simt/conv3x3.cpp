// csrc/cuda/conv3x3.cuh on the CPU.
#include "module.h"

#include "cuda/conv3x3.cuh"

namespace {

using namespace fastsr::cuda;
using Strides = std::array<int64_t, 3>;

PixelStrides pixels(const Strides& s) { return {s[0], s[1], s[2]}; }

template <class T>
void run(uint64_t seed, bool tf32, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out,
         const Strides& x_strides, const std::array<int64_t, 4>& weight_strides, int64_t bias_stride, const Strides& residual_strides,
         const Strides& out_strides, int64_t batch, int cin, int cout, int height, int width, int upsample, int pixel_shuffle,
         float negative_slope, float scale) {
  const auto& w = weight_strides;
  const Conv3x3Call<T> call{pointer<const T>(x), pointer<const T>(weight), pointer<const T>(bias), pointer<const T>(residual),
                            pointer<T>(out), pixels(x_strides), pixels(residual_strides), pixels(out_strides), {w[0], w[1], w[2], w[3]},
                            bias_stride, batch, cin, cout, height, width, upsample, pixel_shuffle, negative_slope, scale};
  Scratch<T> packed(conv3x3_packed_size<T>(cin, cout));
  const simt::Launcher launch{seed};
  if constexpr (std::is_same_v<T, float>) {
    if (!tf32) return conv3x3_fma(launch, call, packed.data.get());
  }
  conv3x3_mma(launch, call, packed.data.get());
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, m) {
  m.def("float32", run<float>);
  m.def("bfloat16", run<__nv_bfloat16>);
  m.def("float16", run<__half>);
}
