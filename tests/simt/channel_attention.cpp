// csrc/cuda/channel_attention.cuh on the CPU, and attention_cluster.cuh where `clusters` is set.
#include "module.h"

#include "cuda/channel_attention.cuh"

namespace {

using namespace fastsr::cuda;

// A tensor's address and its strides.
using View = std::pair<uintptr_t, std::array<int64_t, 4>>;
// Batch, channels, height, width; planar; scale.
using Shape = std::tuple<int64_t, int, int, int, bool, float>;
// Squeezed channels, gate, activation; down_weight, down_bias, up_weight, up_bias.
using Parameters = std::tuple<int, int64_t, int64_t, std::array<uintptr_t, 4>>;

template <class T>
Picture<T> view(const View& v) {
  return {pointer<T>(v.first), v.second[0], v.second[1], v.second[2], v.second[3]};
}

template <class... Pictures>
AttentionShape shape_of(const Shape& s, const Pictures&... pictures) {
  const auto& [n, c, h, w, planar, scale] = s;
  return attention_shape(n, c, h, w, planar, scale, pictures...);
}

template <class T>
GateCall<T> gate_call(const Shape& s, const Parameters& p) {
  const auto& [squeezed, gate, activation, at] = p;
  return {std::get<1>(s), squeezed, static_cast<fastsr::Gate>(gate), static_cast<fastsr::Activation>(activation),
          pointer<const T>(at[0]), pointer<const T>(at[1]), pointer<const T>(at[2]), pointer<const T>(at[3])};
}

// Poisoned memory until the end of the call.
struct Allocate {
  mutable std::vector<Scratch<char>> kept;
  void* operator()(int64_t bytes) const { return kept.emplace_back(static_cast<size_t>(bytes)).data.get(); }
};

template <class T>
void forward(uint64_t seed, bool clusters, const Shape& s, const Parameters& p, const View& x, const View& residual, const View& out, uintptr_t pooled,
             uintptr_t gates) {
  const auto a = view<const T>(x), b = view<const T>(residual);
  const auto y = view<T>(out);
  const simt::Launcher launch{seed, clusters};
  const Allocate allocate;
  Attention(launch, allocate, shape_of(s, a, b, y), gate_call<T>(s, p)).forward(a, b, y, pointer<float>(pooled), pointer<float>(gates));
}

template <class T>
void backward(uint64_t seed, const Shape& s, const Parameters& p, const View& grad, const View& x, uintptr_t pooled, uintptr_t gates,
              const View& dx, const std::array<uintptr_t, 4>& to) {
  const auto g = view<const T>(grad), a = view<const T>(x);
  const auto d = view<T>(dx);
  const simt::Launcher launch{seed};
  const Allocate allocate;
  Attention(launch, allocate, shape_of(s, a, g, d), gate_call<T>(s, p))
      .backward(g, a, pointer<float>(pooled), pointer<float>(gates), d,
                {pointer<T>(to[0]), pointer<T>(to[1]), pointer<T>(to[2]), pointer<T>(to[3])});
}

// Unit, joined, columns, strips, steps, whether the gate is the second pass's prologue, and the steps of a cluster's blocks.
template <class T>
std::tuple<int, bool, int, int, int, bool, int> cut(const Shape& s, const Parameters& p, const std::vector<View>& pictures) {
  const auto at = [&](size_t i) { return i < pictures.size() ? view<const T>(pictures[i]) : Picture<const T>{}; };
  const AttentionShape shape = shape_of(s, at(0), at(1), at(2));
  const GateCall<T> gate = gate_call<T>(s, p);
  const int clustered = in_cluster(shape, 16 / sizeof(T), gate.channels, gate.squeezed).steps;
  return {shape.unit, shape.joined, shape.columns, shape.strips, shape.steps, gate_is_small(shape, gate), clustered};
}

template <class T>
void define(py::module_& m, const char* name) {
  py::module_ part = m.def_submodule(name);
  part.def("forward", forward<T>);
  part.def("backward", backward<T>);
  part.def("cut", cut<T>);
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, m) {
  define<float>(m, "float32");
  define<__nv_bfloat16>(m, "bfloat16");
  define<__half>(m, "float16");
}
