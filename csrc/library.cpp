// The operators' schemas, one line each. Implementations register themselves beside their code
// (csrc/cpu/<op>.cpp, csrc/cuda/<op>.cu); fakes and autograd live in Python (fastsr/kernels/<op>/).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastsr, m) {
  m.def("build_info() -> str");
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str isa) -> ()");
  m.def("channel_attention(Tensor x, Tensor? down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? residual, Tensor(a!) out, Tensor(b!)? pooled, Tensor(c!)? gates, float res_scale, int gate, int activation) -> ()");
  m.def("channel_attention_backward(Tensor grad, Tensor x, Tensor pooled, Tensor gates, Tensor? down_weight, Tensor? down_bias, Tensor up_weight, Tensor(a!)? dx, Tensor(b!)? ddown_weight, Tensor(c!)? ddown_bias, Tensor(d!)? dup_weight, Tensor(e!)? dup_bias, float res_scale, int gate, int activation) -> ()");
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) out, float negative_slope, float scale, int upsample, int pixel_shuffle, Tensor? packed=None, bool tf32=False) -> ()");
  m.def("pack_weights(Tensor[] weights, Tensor?[] biases, int pixel_shuffle) -> Tensor");
  m.def("dense_block(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? residual, Tensor(a!)? workspace, Tensor(b!) out, float negative_slope, float res_scale, float residual_scale, Tensor? packed=None, bool tf32=False) -> ()");
  m.def("dense_block_features(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor(a!) workspace, float negative_slope, bool tf32=False) -> ()");
  m.def("dense_block_backward(Tensor grad, Tensor workspace, Tensor[] weights, Tensor(a!) grad_workspace, Tensor(b!)? dx, Tensor(c!)[] dweights, Tensor(d!)[] dbiases, float negative_slope, float res_scale, float residual_scale, bool tf32=False) -> ()");
  m.def("vq_nearest(Tensor x, Tensor codebook, bool cosine, Tensor(a!) indices, Tensor(b!)? distances, Tensor(c!)? rescored) -> ()");
  m.def("vector_quantize(Tensor x, Tensor codebook, Tensor? mask, bool cosine, bool fast, Tensor(a!) quantized, Tensor(b!) indices, Tensor(c!) loss, Tensor(d!) counts, Tensor(e!) sums, Tensor(f!)? distances) -> ()");
  m.def("vector_quantize_dx(Tensor? grad, Tensor? commitment_grad, Tensor x, Tensor quantized, Tensor? mask, bool rotation, Tensor(a!) dx) -> ()");
  m.def("vector_quantize_dcodebook(Tensor codebook_grad, Tensor x, Tensor quantized, Tensor indices, Tensor? mask, bool fast, Tensor(a!) dcodebook) -> ()");
  m.def("rcab(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor(a!) hidden, Tensor(b!) sums, Tensor(c!) attention, Tensor(d!) out, float res_scale, Tensor? packed=None, bool tf32=False) -> ()");
  m.def("rcab_backward(Tensor grad, Tensor x, Tensor hidden, Tensor sums, Tensor attention, Tensor weight1, Tensor weight2, Tensor? bias2, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor(a!) grad_hidden, Tensor(b!)? dx, Tensor(c!)[] gradients, float res_scale, bool tf32=False) -> ()");
}
