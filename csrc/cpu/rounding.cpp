// Rounding parameters to a 16-bit dtype, to the nearest and ties to even.
#include "cpu/rounding.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace fastsr::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
void round_to(const float* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

}  // namespace

float rounded(float value, Element type) {
  switch (type) {
    case Element::bf16: return static_cast<float>(BFloat16(value));
    case Element::f16: return static_cast<float>(Half(value));
    default: return value;
  }
}

const void* values_as(ScalarType type, const std::optional<Tensor>& given, std::vector<Tensor>& kept) {
  if (!given) return nullptr;
  const Tensor& t = *given;
  if (t.scalar_type() == type) return t.const_data_ptr();
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && (type == ScalarType::BFloat16 || type == ScalarType::Half),
                  "fastsr: a parameter of dtype ", torch::headeronly::toString(t.scalar_type()), " for pictures of ",
                  torch::headeronly::toString(type), "; expected the same or float32");
  Tensor& copy = kept.emplace_back(torch::stable::new_empty(t, {t.numel()}, type));
  const float* from = static_cast<const float*>(t.const_data_ptr());
  if (type == ScalarType::BFloat16) round_to(from, static_cast<BFloat16*>(copy.mutable_data_ptr()), t.numel());
  else round_to(from, static_cast<Half*>(copy.mutable_data_ptr()), t.numel());
  return copy.const_data_ptr();
}

}  // namespace fastsr::cpu
