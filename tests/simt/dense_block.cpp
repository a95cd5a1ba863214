// csrc/cuda/dense_block.cuh on the CPU.
#include "module.h"

#include "cuda/dense_block.cuh"

namespace {

using namespace fastsr::cuda;

// A tensor's address and its strides of image, row and pixel.
using Pixels = std::pair<uintptr_t, std::array<int64_t, 3>>;
// One convolution: weight, its strides, bias and its stride, inputs, outputs.
using Conv = std::tuple<uintptr_t, std::array<int64_t, 4>, uintptr_t, int64_t, int, int>;
using Size = std::tuple<int64_t, int, int>;

template <class T>
ImageView<T> view(const Pixels& p) {
  return {pointer<T>(p.first), {p.second[0], p.second[1], p.second[2]}};
}

// kWide, here and below: the parameters are float32, and so are their gradients.
template <class T, bool kWide>
DenseBlock<T> describe(const Size& size, const std::vector<Conv>& convs, float negative_slope) {
  DenseBlock<T> block{std::get<0>(size), std::get<1>(size), std::get<2>(size), negative_slope, {}};
  for (const auto& [weight, s, bias, bias_stride, inputs, outputs] : convs) {
    block.convs.push_back({{pointer<const void>(weight), kWide}, {s[0], s[1], s[2], s[3]}, {pointer<const void>(bias), kWide}, bias_stride,
                           inputs, outputs});
  }
  return block;
}

template <class Products, class T, bool kWide>
void forward(uint64_t seed, bool hopper, const Size& size, const std::vector<Conv>& convs, const Pixels& x, const Pixels& residual,
             const Pixels& workspace, const Pixels& out, float negative_slope, float res_scale, float residual_scale) {
  const Allocate allocate;
  const simt::Launcher launch{seed, hopper};
  block_forward<Products, T>(launch, allocate, describe<T, kWide>(size, convs, negative_slope), view<const T>(x), view<const T>(residual),
                             view<T>(workspace), view<T>(out), res_scale, residual_scale);
}

template <class Products, class T, bool kWide>
void features(uint64_t seed, bool hopper, const Size& size, const std::vector<Conv>& convs, const Pixels& x, int channels,
              const Pixels& workspace, float negative_slope) {
  const Allocate allocate;
  const DenseBlock<T> block = describe<T, kWide>(size, convs, negative_slope);
  block_features<Products, T>(simt::Launcher{seed, hopper}, allocate, block, view<const T>(x), channels, view<T>(workspace));
}

template <class Products, class T, bool kWide>
void backward(uint64_t seed, bool hopper, const Size& size, const std::vector<Conv>& convs, const Pixels& grad, const Pixels& workspace,
              const Pixels& grad_workspace, const Pixels& dx, const std::vector<std::pair<uintptr_t, uintptr_t>>& gradients,
              float negative_slope, float res_scale, float residual_scale) {
  const Allocate allocate;
  std::vector<std::pair<void*, void*>> written;
  for (const auto& [dweight, dbias] : gradients) written.emplace_back(pointer<void>(dweight), pointer<void>(dbias));
  const simt::Launcher launch{seed, hopper};
  block_backward<Products, T>(launch, allocate, describe<T, kWide>(size, convs, negative_slope), view<const T>(grad), view<const T>(workspace),
                              view<T>(grad_workspace), view<T>(dx), written, res_scale, residual_scale);
}

template <class T, bool kWide = false, class Products = ExactProducts<T>>
void define(py::module_& m, const char* name) {
  py::module_ part = m.def_submodule(name);
  part.def("forward", forward<Products, T, kWide>);
  part.def("features", features<Products, T, kWide>);
  part.def("backward", backward<Products, T, kWide>);
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, m) {
  define_wgmma_calls(m);
  define<float>(m, "float32");
  define<float, false, TensorCores>(m, "tf32");
  define<__nv_bfloat16>(m, "bfloat16");
  define<__half>(m, "float16");
  define<__nv_bfloat16, true>(m, "bfloat16_wide");
  define<__half, true>(m, "float16_wide");
}
