// fastsr::vq_nearest on a CPU; vq_search.cpp holds the search.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/vq_args.h"
#include "cpu/conv_driver.h"
#include "cpu/vq_search.h"

namespace fastsr::cpu {
namespace {

void vq_nearest(Tensor x, Tensor codebook, bool cosine, Tensor indices, std::optional<Tensor> distances, std::optional<Tensor> rescored) {
  const char* op = "vq_nearest";
  const VqShape s = vq_shape(x, codebook, op);
  check_per_row(indices, s, ScalarType::Long, op, "indices");
  check_per_row(distances, s, ScalarType::Float, op, "distances");
  STD_TORCH_CHECK(!rescored || (rescored->numel() == 2 && rescored->is_contiguous() && rescored->scalar_type() == ScalarType::Long), op,
                  ": rescored has ", rescored->numel(), " elements; expected 2 of int64");
  VqProblem problem = vq_problem(x, codebook, s, cosine, indices, distances, op);
  problem.rescored = rescored ? static_cast<int64_t*>(rescored->mutable_data_ptr()) : nullptr;
  nearest_codes(problem);
}

}  // namespace
}  // namespace fastsr::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsr, CPU, m) { m.impl("vq_nearest", TORCH_BOX(&fastsr::cpu::vq_nearest)); }
