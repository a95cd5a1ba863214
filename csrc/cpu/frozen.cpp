// fastsr::pack_weights on a CPU, and the check of what it gave.
#include "cpu/frozen.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>

namespace fastsr::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Header {
  int32_t lanes, vectors, unit, operand;
  int64_t type, pixel_shuffle, convs, bytes, sizes, unused;
  bool operator==(const Header&) const = default;
};
static_assert(sizeof(Header) == 64, "the packed weights behind it are aligned to 64 bytes");

// `type` is the one that the values are rounded to: a float kernel serves the 16-bit types too.
Header header_of(const Kernel& kernel, Element type, const Sizes& sizes, int64_t pixel_shuffle) {
  Header h{kernel.lanes, kernel.vectors, kernel.unit, static_cast<int32_t>(kernel.operand), static_cast<int64_t>(type),
           pixel_shuffle, static_cast<int64_t>(sizes.size()), sizeof(Header), 0, 0};
  for (const auto& [cout, cin] : sizes) {
    h.bytes += packed_bytes(kernel, cout, cin);
    h.sizes = h.sizes * 1000003 + cout * 65537 + cin;  // tells lists of sizes apart
  }
  return h;
}

void fill(const Kernel& kernel, const PackedConv& conv, Element type, const Tensor& w, const std::optional<Tensor>& bias, int64_t pixel_shuffle) {
  const Element given = element_of(w.scalar_type(), "pack_weights");
  pack_weights(kernel, conv, {w.const_data_ptr(), given, w.stride(0), w.stride(1), w.stride(2), w.stride(3), type}, 0, w.size(1), pixel_shuffle);
  pack_bias(kernel, conv, bias ? bias->const_data_ptr() : nullptr, given, bias ? bias->stride(0) : 0, type, pixel_shuffle);
}

Tensor pack(std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases, int64_t pixel_shuffle) {
  STD_TORCH_CHECK(!weights.empty() && weights.size() == biases.size(), "pack_weights: ", weights.size(), " weights and ", biases.size(),
                  " biases; expected as many of each, at least one");
  Sizes sizes;
  for (const Tensor& w : weights) {
    STD_TORCH_CHECK(w.dim() == 4 && w.size(2) == 3 && w.size(3) == 3 && w.scalar_type() == weights[0].scalar_type(),
                    "pack_weights: expected weights (O, C, 3, 3) of one dtype");
    sizes.emplace_back(w.size(0), w.size(1));
  }
  const Element type = element_of(weights[0].scalar_type(), "pack_weights");
  const Kernel& kernel = choose_kernel(type);
  const Header header = header_of(kernel, type, sizes, pixel_shuffle);
  Tensor frozen = torch::stable::new_empty(weights[0], {header.bytes}, ScalarType::Byte);
  char* p = static_cast<char*>(frozen.mutable_data_ptr());
  std::memcpy(p, &header, sizeof header);
  p += sizeof header;
  for (size_t k = 0; k < weights.size(); ++k) {
    const auto [cout, cin] = sizes[k];
    fill(kernel, packed_conv(kernel, cout, cin, p), type, weights[k], biases[k], pixel_shuffle);
    p += packed_bytes(kernel, cout, cin);
  }
  return frozen;
}

}  // namespace

char* frozen_weights(const std::optional<Tensor>& frozen, const Kernel& kernel, Element type, const Sizes& sizes, int64_t pixel_shuffle) {
  if (!frozen || frozen->numel() < static_cast<int64_t>(sizeof(Header))) return nullptr;
  char* p = static_cast<char*>(const_cast<void*>(frozen->const_data_ptr()));
  Header header;
  std::memcpy(&header, p, sizeof header);
  const bool fits = header == header_of(kernel, type, sizes, pixel_shuffle) && frozen->numel() == header.bytes;
  return fits && reinterpret_cast<uintptr_t>(p) % 64 == 0 ? p + sizeof header : nullptr;
}

PackedConvs::PackedConvs(const Kernel& kernel, Element type, const Sizes& sizes, const std::optional<Tensor>& frozen)
    : kernel_(kernel), type_(type), next_(frozen_weights(frozen, kernel, type, sizes, 1)), filled_(next_ != nullptr) {
  if (filled_) return;
  thread_local Buffer memory;
  int64_t bytes = 0;
  for (const auto& [cout, cin] : sizes) bytes += packed_bytes(kernel, cout, cin);
  next_ = static_cast<char*>(memory.reserve(bytes));
}

PackedConv PackedConvs::take(int64_t cout, int64_t cin) {
  const PackedConv conv = packed_conv(kernel_, cout, cin, next_);
  next_ += packed_bytes(kernel_, cout, cin);
  return conv;
}

PackedConv PackedConvs::take(const Tensor& weight, const std::optional<Tensor>& bias) {
  const PackedConv conv = take(weight.size(0), weight.size(1));
  if (!filled_) fill(kernel_, conv, type_, weight, bias, 1);
  return conv;
}

}  // namespace fastsr::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsr, CPU, m) { m.impl("pack_weights", TORCH_BOX(&fastsr::cpu::pack)); }
