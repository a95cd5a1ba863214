// csrc/cuda/conv3x3.cuh on the CPU.
#include "module.h"

#include "cuda/conv3x3.cuh"

namespace {

using namespace fastsr::cuda;
using Strides = std::array<int64_t, 3>;

PixelStrides pixels(const Strides& s) { return {s[0], s[1], s[2]}; }

// kWide: the parameters are float32.
template <class T, bool kWide = false>
void run(uint64_t seed, bool tf32, bool hopper, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out,
         const Strides& x_strides, const std::array<int64_t, 4>& weight_strides, int64_t bias_stride, const Strides& residual_strides,
         const Strides& out_strides, int64_t batch, int cin, int cout, int height, int width, int upsample, int pixel_shuffle,
         float negative_slope, float scale) {
  const auto& w = weight_strides;
  Conv3x3Call<T> call{};
  call.x = {pointer<const T>(x), pixels(x_strides)}, call.out = {pointer<T>(out), pixels(out_strides)};
  call.skip = {pointer<const T>(residual), pixels(residual_strides)};
  call.batch = batch, call.cin = cin, call.cout = cout, call.height = height, call.width = width;
  call.upsample = upsample, call.pixel_shuffle = pixel_shuffle;
  call.negative_slope = negative_slope, call.scale = scale, call.scale2 = 1.0f;
  auto run = [&]<class Products>(Products) {
    const simt::Launcher launch{seed, hopper};
    call.stacked = stacked_outputs<T>(launch, call.x, cin, cout, upsample);
    Scratch<T> packed(packed_size<Products>(call, kWide));
    pack_and_convolve<Products>(launch, call, Parameter<T>{pointer<const void>(weight), kWide}, {w[0], w[1], w[2], w[3]},
                                Parameter<T>{pointer<const void>(bias), kWide}, bias_stride, packed.data.get());
  };
  if (tf32) run(TensorCores{});
  else run(ExactProducts<T>{});
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, m) {
  define_wgmma_calls(m);
  m.def("float32", run<float>);
  m.def("bfloat16", run<__nv_bfloat16>);
  m.def("float16", run<__half>);
  m.def("bfloat16_wide", run<__nv_bfloat16, true>);
  m.def("float16_wide", run<__half, true>);
}
