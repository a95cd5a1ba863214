// csrc/cuda/vector_quantize.cuh on the CPU.
#include "module.h"

#include "cuda/vector_quantize.cuh"

namespace {

using namespace fastsr::cuda;

// A tensor (outer, heads, depth, inner): address (0 for none), sizes, strides, whether fours of values are loaded at once.
using Given = std::tuple<uintptr_t, std::array<int64_t, 4>, std::array<int64_t, 4>, bool>;

template <class T>
RowView<T> rows(const Given& t) {
  const auto& [address, size, strides, vectors] = t;
  return {pointer<const T>(address), size[3], strides[0], strides[1], strides[2], strides[3], vectors};
}

NumberedRows numbers(const Given& x, uintptr_t indices, uintptr_t mask, int codes) {
  const auto& size = std::get<1>(x);
  return {pointer<const int64_t>(indices), pointer<const bool>(mask), static_cast<int>(size[0] * size[1] * size[3]), static_cast<int>(size[1]),
          static_cast<int>(size[3]), codes};
}

int depth(const Given& x) { return static_cast<int>(std::get<1>(x)[2]); }

template <class T>
void forward(uint64_t seed, bool fast, const Given& x, uintptr_t codebook, int codes, bool code_vectors, uintptr_t mask, bool cosine, const Given& quantized,
             uintptr_t indices, uintptr_t loss, uintptr_t counts, uintptr_t sums, uintptr_t distances) {
  const Allocate allocate;
  const simt::Launcher launch{seed};
  const NumberedRows all = numbers(x, indices, mask, codes);
  const CodeView<T> book{pointer<const T>(codebook), codes, depth(x), code_vectors};
  const NearestCall<T> search{rows<T>(x), book, all.count / all.heads, cosine, {pointer<int64_t>(indices), pointer<float>(distances), nullptr, all.inner, all.heads}};
  find_nearest(search, launch, allocate, book.depth >= kTensorDepth);
  quantize(QuantizeCall<T>{search.x, rows<T>(quantized), book, all, pointer<float>(loss), pointer<int64_t>(counts), pointer<float>(sums)}, fast, launch, allocate);
}

template <class T>
void dx(uint64_t seed, const Given& grad, uintptr_t commitment_grad, const Given& x, const Given& quantized, uintptr_t mask, bool rotation, const Given& to) {
  const InputGradient<T> call{rows<T>(grad), rows<T>(x), rows<T>(quantized), rows<T>(to), numbers(x, 0, mask, 0), pointer<const float>(commitment_grad), nullptr, depth(x), 1};
  input_gradient(call, rotation, simt::Launcher{seed}, Allocate{});
}

template <class T>
void dcodebook(uint64_t seed, bool fast, uintptr_t grad, const Given& x, const Given& quantized, uintptr_t indices, uintptr_t mask, int codes, uintptr_t to) {
  codebook_gradient(rows<T>(x), rows<T>(quantized), numbers(x, indices, mask, codes), depth(x), pointer<const float>(grad), pointer<T>(to), fast, simt::Launcher{seed}, Allocate{});
}

template <class T>
void define(py::module_& m, const std::string& type) {
  m.def(("forward_" + type).c_str(), forward<T>);
  m.def(("dx_" + type).c_str(), dx<T>);
  m.def(("dcodebook_" + type).c_str(), dcodebook<T>);
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, m) {
  define<float>(m, "float32");
  define<__nv_bfloat16>(m, "bfloat16");
  define<__half>(m, "float16");
}
