// csrc/cuda/rcab.cuh on the CPU.
#include "module.h"

#include "cuda/rcab.cuh"

namespace {

using namespace fastsr::cuda;

// A tensor's address and its strides of image, row and pixel.
using Pixels = std::pair<uintptr_t, std::array<int64_t, 3>>;
using Size = std::tuple<int64_t, int, int>;
// Weight, its strides, bias and its stride, inputs, outputs.
using Conv = std::tuple<uintptr_t, std::array<int64_t, 4>, uintptr_t, int64_t, int, int>;
// Squeezed channels; down_weight, down_bias, up_weight, up_bias.
using Squeeze = std::pair<int, std::array<uintptr_t, 4>>;
// Sums of taps, pooled, gates.
using Vectors = std::array<uintptr_t, 3>;

template <class T>
ImageView<T> view(const Pixels& p) {
  return {pointer<T>(p.first), {p.second[0], p.second[1], p.second[2]}};
}

// kWide, here and below: the parameters are float32, and so are their gradients.
template <class T, bool kWide>
RcabConv<T> conv_of(const Conv& c) {
  const auto& [weight, s, bias, bias_stride, inputs, outputs] = c;
  return {{pointer<const void>(weight), kWide}, {s[0], s[1], s[2], s[3]}, {pointer<const void>(bias), kWide}, bias_stride, inputs, outputs};
}

template <class T, bool kWide>
RcabCall<T> describe(const Size& size, const Conv& first, const Conv& second, const Squeeze& squeeze, float res_scale) {
  const auto& at = squeeze.second;
  GateCall<T> gate{std::get<5>(second), squeeze.first, fastsr::Gate::sigmoid, fastsr::Activation::relu,
                   pointer<const T>(at[0]), pointer<const T>(at[1]), pointer<const T>(at[2]), pointer<const T>(at[3])};
  if (kWide) gate.down_weight = gate.down_bias = gate.up_weight = gate.up_bias = nullptr;
  const auto parameter = [&](int i) { return Parameter<T>{pointer<const void>(at[i]), kWide}; };
  return {std::get<0>(size), std::get<1>(size), std::get<2>(size), conv_of<T, kWide>(first), conv_of<T, kWide>(second), gate,
          {parameter(0), parameter(1), parameter(2), parameter(3)}, res_scale};
}

RcabVectors vectors_of(const Vectors& v) { return {pointer<float>(v[0]), pointer<float>(v[1]), pointer<float>(v[2])}; }

template <class Products, class T, bool kWide>
void forward(uint64_t seed, bool hopper, const Size& size, const Conv& first, const Conv& second, const Squeeze& squeeze, float res_scale,
             const Pixels& x, const Pixels& hidden, const Vectors& vectors, const Pixels& out) {
  const simt::Launcher launch{seed, hopper};
  const Allocate allocate;
  const RcabCall<T> call = describe<T, kWide>(size, first, second, squeeze, res_scale);
  Rcab<Products, T, simt::Launcher, Allocate>(launch, allocate, call)
      .forward(view<const T>(x), view<T>(hidden), vectors_of(vectors), view<T>(out));
}

template <class Products, class T, bool kWide>
void backward(uint64_t seed, bool hopper, const Size& size, const Conv& first, const Conv& second, const Squeeze& squeeze, float res_scale,
              const Pixels& grad, const Pixels& x, const Pixels& hidden, const Vectors& vectors, const Pixels& grad_hidden, const Pixels& dx,
              const std::vector<uintptr_t>& gradients, int64_t image_bytes) {
  const simt::Launcher launch{seed, hopper};
  const Allocate allocate;
  RcabCall<T> call = describe<T, kWide>(size, first, second, squeeze, res_scale);
  call.image_bytes = image_bytes;
  std::vector<void*> to;
  for (uintptr_t address : gradients) to.push_back(pointer<void>(address));
  Rcab<Products, T, simt::Launcher, Allocate>(launch, allocate, call)
      .backward(view<const T>(grad), view<const T>(x), view<const T>(hidden), vectors_of(vectors), view<T>(grad_hidden), view<T>(dx),
                to.empty() ? nullptr : to.data());
}

template <class T, bool kWide = false, class Products = ExactProducts<T>>
void define(py::module_& m, const char* name) {
  py::module_ part = m.def_submodule(name);
  part.def("forward", forward<Products, T, kWide>);
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
