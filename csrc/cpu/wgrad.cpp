// Shares the weight gradients of a block's convolutions out over torch's threads.
//
// A task is some output channels x some input channels (x one row of taps, where there are many threads) of one convolution,
// over all pixels: each element is summed by one task in the order that its kernel fixes. The costliest tasks are taken first.
#include "cpu/wgrad.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/conv_driver.h"
#include "cpu/isa.h"
#include "cpu/wgrad_engine.h"

namespace fastsr::cpu {
namespace {

const WeightGradientKernel& choose_weight_gradient([[maybe_unused]] Element type) {
#if defined(__x86_64__)
  const Isa best = isa();
  if (type == Element::bf16 && best >= Isa::amx) return amx::weight_gradient;
  if (type == Element::bf16 && best >= Isa::avx512_bf16) return avx512_bf16::weight_gradient;
  if (best >= Isa::avx512) return avx512::weight_gradient;
  if (best >= Isa::avx2) return avx2::weight_gradient;
#endif
  return portable::weight_gradient;
}

int64_t parts(int64_t size, int64_t most) { return (size + most - 1) / most; }

char* offset(const void* data, int64_t elements, int64_t size) {
  return const_cast<char*>(static_cast<const char*>(data)) + elements * size;
}

}  // namespace

void weight_gradients(const WeightGradient* convs, int count, int64_t batch, int64_t height, int64_t width, Element type, float scale) {
  const WeightGradientKernel& kernel = choose_weight_gradient(type);
  const int64_t size = type == Element::f32 ? 4 : 2, threads = torch::stable::get_num_threads();
  const auto blocks = [&](const WeightGradient& conv) { return parts(conv.cin, kernel.block) * parts(conv.cout, kernel.outputs); };
  int64_t total = 0;
  for (int i = 0; i < count; ++i) total += blocks(convs[i]);
  // A task of more blocks copies less, but leaves threads idle at the end.
  const int64_t most = std::max<int64_t>(1, std::min(kernel.channels / kernel.block, total / (2 * threads)));
  const int64_t taps = total < 2 * threads && threads > 2 ? 1 : 3;

  std::vector<WeightGradientTask> tasks;
  for (int i = 0; i < count; ++i) {
    const WeightGradient& conv = convs[i];
    const int64_t ranges = parts(parts(conv.cin, kernel.block), most), splits = parts(conv.cout, kernel.outputs);
    const int64_t channels = parts(parts(conv.cin, ranges), kernel.block) * kernel.block, outputs = parts(conv.cout, splits);
    for (int64_t o = 0; o < conv.cout; o += outputs) {
      for (int64_t c = 0; c < conv.cin; c += channels) {
        for (int64_t tap = 0; tap < 3; tap += taps) {
          WeightGradientTask task{conv.x, conv.g, batch, height, width};
          task.x.data = offset(conv.x.data, c, size), task.g.data = offset(conv.g.data, o, size);
          task.channels = std::min(channels, conv.cin - c), task.outputs = std::min(outputs, conv.cout - o);
          task.first_tap = tap, task.last_tap = tap + taps;
          const int64_t result = conv.wide ? 4 : size;
          task.dweight = offset(conv.dweight, (o * conv.cin + c) * 9, result), task.output_stride = conv.cin * 9;
          task.dbias = conv.dbias && c == 0 && tap == 0 ? offset(conv.dbias, o, result) : nullptr;
          task.wide = conv.wide;
          task.scale = scale;
          tasks.push_back(task);
        }
      }
    }
  }
  const auto cost = [&](const WeightGradientTask& t) { return parts(t.channels, kernel.block) * t.outputs; };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const auto& a, const auto& b) { return cost(a) > cost(b); });

  const int64_t waiting = static_cast<int64_t>(tasks.size());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, waiting, 1, [&](int64_t, int64_t) {
    thread_local Buffer scratch;
    // Every thread takes from the same queue, whatever range it was given: the tasks' costs differ.
    for (int64_t i = next++; i < waiting; i = next++) {
      WeightGradientTask& task = tasks[i];
      task.scratch = scratch.reserve(kernel.scratch_bytes(task));
      kernel.run[static_cast<int>(type)](task);
    }
  });
}

}  // namespace fastsr::cpu
