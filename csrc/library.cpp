// The operators' schemas, one line each. Implementations register themselves beside their code
// (csrc/cpu/<op>.cpp, csrc/cuda/<op>.cu); fakes and autograd live in Python (fastsr/kernels/<op>/).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastsr, m) {
  m.def("build_info() -> str");
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str isa) -> ()");
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) out, float negative_slope, float scale, int upsample, int pixel_shuffle) -> ()");
}
