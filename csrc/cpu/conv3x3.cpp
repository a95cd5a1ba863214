// fastsr::conv3x3 on a CPU: every row of every image is one job of the convolution engine, shared out over torch's threads.
//
// out and residual may be the same tensor; x shares no element with out.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/conv3x3_args.h"
#include "cpu/conv_rows.h"
#include "cpu/frozen.h"
#include "cpu/pages.h"

namespace fastsr::cpu {
namespace {

// Offsets of the packed output channels within the r x r pixels that PixelShuffle makes of one.
std::vector<int64_t> shuffled_lanes(const Conv3x3Args& a, const fastsr::Pixels& strides) {
  const int64_t r = a.pixel_shuffle, channels = a.cout / (r * r);
  std::vector<int64_t> lanes(a.cout);
  for (int64_t p = 0; p < a.cout; ++p) {
    const int64_t s = p / channels;
    lanes[p] = s / r * strides.h + s % r * strides.w + p % channels;
  }
  return lanes;
}

const char* offset(const void* data, int64_t elements, int64_t size) { return static_cast<const char*>(data) + elements * size; }

void conv3x3(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual, Tensor out,
             double negative_slope, double scale, int64_t upsample, int64_t pixel_shuffle, std::optional<Tensor> packed, bool /* tf32: a GPU's */) {
  const Conv3x3Args a = conv3x3_args(x, weight, bias, residual, out, negative_slope, scale, upsample, pixel_shuffle);
  const Element type = element_of(x.scalar_type(), "conv3x3");
  if (a.batch * a.height * a.width * a.cout == 0) return;
  prefer_huge_output(out);
  const Kernel& kernel = choose_kernel(type);
  const int64_t size = type == Element::f32 ? 4 : 2, r = a.pixel_shuffle;

  thread_local Buffer weights;
  char* frozen = frozen_weights(packed, kernel, type, {{a.cout, a.cin}}, r);
  PackedConv conv = packed_conv(kernel, a.cout, a.cin, frozen ? frozen : weights.reserve(packed_bytes(kernel, a.cout, a.cin)));
  if (!frozen) {
    const Element given = element_of(weight.scalar_type(), "conv3x3");
    const WeightView view{weight.const_data_ptr(), given, weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3), type};
    pack_weights(kernel, conv, view, 0, a.cin, r);
    pack_bias(kernel, conv, bias ? bias->const_data_ptr() : nullptr, given, bias ? bias->stride(0) : 0, type, r);
  }

  std::vector<int64_t> out_lanes, skip_lanes;
  if (r > 1) out_lanes = shuffled_lanes(a, a.out);
  if (r > 1 && residual) skip_lanes = shuffled_lanes(a, a.residual);
  const RowInput::Layout layout{x.const_data_ptr(), type, a.x.n, a.x.h, a.x.w, a.cin, x.size(2), x.size(3), a.upsample};
  void* to = out.mutable_data_ptr();
  const void* skip = residual ? residual->const_data_ptr() : nullptr;

  RowJob common{};
  common.conv = &conv;
  common.cold = true;
  common.out_pixel = a.out.w * r;
  common.epilogue.slope = a.negative_slope, common.epilogue.scale = a.scale;
  common.epilogue.skip_pixel = a.residual.w * r;
  common.epilogue.out_lanes = r > 1 ? out_lanes.data() : nullptr;
  common.epilogue.skip_lanes = r > 1 && skip ? skip_lanes.data() : nullptr;
  const auto place = [&](RowJob& job, int64_t n, int64_t y) {
    job.out = const_cast<char*>(offset(to, n * a.out.n + y * r * a.out.h, size));
    if (skip) job.epilogue.skip = offset(skip, n * a.residual.n + y * r * a.residual.h, size);
  };
  convolve_rows(kernel, layout, type, common, 0, a.batch * a.height, place, [](int64_t, const RowJob&) {});
}

}  // namespace
}  // namespace fastsr::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsr, CPU, m) { m.impl("conv3x3", TORCH_BOX(&fastsr::cpu::conv3x3)); }
