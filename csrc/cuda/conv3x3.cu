// fastsr::conv3x3 on NVIDIA GPUs of compute capability 8.0 and higher; the kernels are in conv3x3.cuh.
#include "cuda/conv3x3.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/conv3x3_args.h"
#include "cuda/image_tensors.cuh"

namespace fastsr::cuda {
namespace {

const char* const kOp = "conv3x3";

template <class Products, class T>
void run(const Conv3x3Args& args, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
         const std::optional<Tensor>& residual, const Tensor& out) {
  Conv3x3Call<T> call{};
  call.x = image_view<T>(x);
  call.out = mutable_image_view<T>(out);
  if (residual) call.skip = image_view<T>(*residual);
  call.batch = args.batch;
  call.cin = checked_int(args.cin, kOp, "the number of input channels"), call.cout = checked_int(args.cout, kOp, "the number of output channels");
  call.height = checked_int(args.height, kOp, "the output's height"), call.width = checked_int(args.width, kOp, "the output's width");
  call.upsample = args.upsample, call.pixel_shuffle = args.pixel_shuffle;
  call.negative_slope = args.negative_slope, call.scale = args.scale, call.scale2 = 1.0f;

  const Launcher launch(x);
  const Scratch allocate(x);
  call.stacked = stacked_outputs<T>(launch, call.x, call.cin, call.cout, call.upsample);
  const int64_t packed = packed_size<Products>(call, is_wide(weight, x));
  pack_and_convolve<Products>(launch, call, parameter<T>(weight, x), {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
                              parameter<T>(bias, x), bias ? bias->stride(0) : 0,
                              static_cast<T*>(allocate(packed * static_cast<int64_t>(sizeof(T)))));
}

void conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
             const Tensor& out, double negative_slope, double scale, int64_t upsample, int64_t pixel_shuffle,
             const std::optional<Tensor>& /* packed: only the CPU has frozen weights */, bool tf32) {
  const Conv3x3Args args = conv3x3_args(x, weight, bias, residual, out, negative_slope, scale, upsample, pixel_shuffle);
  with_products(x, tf32, kOp, [&]<class Products, class T>(Products, T) { run<Products, T>(args, x, weight, bias, residual, out); });
}

}  // namespace

// The dense block convolves with the same kernels.
template void pack_weights(const Launcher&, const std::vector<PackPart<float>>&, float*);
template void pack_weights(const Launcher&, const std::vector<PackPart<__half>>&, __half*);
template void pack_weights(const Launcher&, const std::vector<PackPart<__nv_bfloat16>>&, __nv_bfloat16*);
template void convolve<FusedMultiplyAdds>(const Launcher&, const Conv3x3Call<float>&);
template void convolve<TensorCores>(const Launcher&, const Conv3x3Call<float>&);
template void convolve<TensorCores>(const Launcher&, const Conv3x3Call<__half>&);
template void convolve<TensorCores>(const Launcher&, const Conv3x3Call<__nv_bfloat16>&);

STABLE_TORCH_LIBRARY_IMPL(fastsr, CUDA, m) { m.impl("conv3x3", TORCH_BOX(&conv3x3)); }

}  // namespace fastsr::cuda
