// fastsr::conv3x3 on NVIDIA GPUs of compute capability 8.0 and higher; the kernels are in conv3x3.cuh.
#include "cuda/conv3x3.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "common/conv3x3_args.h"
#include "cuda/launch.cuh"

namespace fastsr::cuda {
namespace {

int checked_int(int64_t value, const char* name) {
  STD_TORCH_CHECK(value <= std::numeric_limits<int>::max(), "conv3x3: ", name, " is ", value, "; expected less than 2^31");
  return static_cast<int>(value);
}

PixelStrides strides(const Pixels& p) { return {p.n, p.h, p.w}; }

template <class T>
void run(const Conv3x3Args& args, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
         const std::optional<Tensor>& residual, const Tensor& out) {
  Conv3x3Call<T> call{};
  call.x = static_cast<const T*>(x.const_data_ptr());
  call.weight = static_cast<const T*>(weight.const_data_ptr());
  call.out = static_cast<T*>(out.mutable_data_ptr());
  call.x_strides = strides(args.x), call.out_strides = strides(args.out);
  call.weight_strides = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  if (bias) call.bias = static_cast<const T*>(bias->const_data_ptr()), call.bias_stride = bias->stride(0);
  if (residual) call.residual = static_cast<const T*>(residual->const_data_ptr()), call.residual_strides = strides(args.residual);
  call.batch = args.batch;
  call.cin = checked_int(args.cin, "the number of input channels"), call.cout = checked_int(args.cout, "the number of output channels");
  call.height = checked_int(args.height, "the output's height"), call.width = checked_int(args.width, "the output's width");
  call.upsample = args.upsample, call.pixel_shuffle = args.pixel_shuffle;
  call.negative_slope = args.negative_slope, call.scale = args.scale;

  const Launcher launch(x);
  // From torch's allocator on the current stream: safe across streams and under graph capture.
  Tensor packed = torch::stable::new_empty(x, {conv3x3_packed_size<T>(args.cin, args.cout)});
  T* buffer = static_cast<T*>(packed.mutable_data_ptr());
  if constexpr (std::is_same_v<T, float>) {
    conv3x3_fma(launch, call, buffer);
  } else {
    conv3x3_mma(launch, call, buffer);
  }
}

void conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
             const Tensor& out, double negative_slope, double scale, int64_t upsample, int64_t pixel_shuffle) {
  const Conv3x3Args args = conv3x3_args(x, weight, bias, residual, out, negative_slope, scale, upsample, pixel_shuffle);
  switch (x.scalar_type()) {
    case ScalarType::Float: return run<float>(args, x, weight, bias, residual, out);
    case ScalarType::BFloat16: return run<__nv_bfloat16>(args, x, weight, bias, residual, out);
    case ScalarType::Half: return run<__half>(args, x, weight, bias, residual, out);
    default: STD_TORCH_CHECK(false, "conv3x3: x has a dtype without a CUDA kernel; expected float32, bfloat16 or float16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastsr, CUDA, m) { m.impl("conv3x3", TORCH_BOX(&conv3x3)); }

}  // namespace fastsr::cuda
