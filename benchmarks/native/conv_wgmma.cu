// The 3x3 convolution's tiles on Hopper: every variant against mma.sync, bit for bit, and the time of both.
//
//   variants   N = 48 .. 256 pixels a product, halo tiles unswizzled and with 64-byte swizzles (csrc/cuda/hopper/conv3x3.cuh)
//   equal      small whole numbers, whose sums are exact in any order: every output must have mma.sync's bits
//   us         of one launch, in a CUDA graph of kLaunches, on normal numbers; the median of kRounds
//
// Predicted: N = 128 with two blocks a multiprocessor leads at 256x256 and 540x960, N = 96 at 16x48x48; 64-byte swizzles read what they
// should and load their tiles faster, since TMA moves 64 bytes of a pixel at a time instead of 16.   Not measured yet.
// Prints one JSON object. nvcc -O3 -std=c++20 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a conv_wgmma.cu
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/conv3x3.cuh"

#define CHECK(call)                                                                                     \
  do {                                                                                                  \
    const cudaError_t status_ = (call);                                                                 \
    if (status_ != cudaSuccess) {                                                                       \
      std::fprintf(stderr, "%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status_));   \
      std::exit(1);                                                                                     \
    }                                                                                                   \
  } while (0)

namespace {

using namespace fastsr::cuda;
using hopper::Swizzle;
using hopper::WgmmaTile;
using T = __nv_bfloat16;

constexpr int kLaunches = 20, kRounds = 7;

struct Launch {
  cudaStream_t stream;
  bool wgmma;
  bool hopper() const { return wgmma; }
  int multiprocessors() const {
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    return properties.multiProcessorCount;
  }
  template <class... Parameters>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, std::type_identity_t<Parameters>... arguments) const {
    CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    void* pointers[] = {&arguments...};
    CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(threads), pointers, shared, stream));
  }
};

struct Shape {
  int cin, cout, n, h, w;
  int64_t inputs() const { return int64_t{n} * h * w * cin; }
  int64_t outputs() const { return int64_t{n} * h * w * cout; }
  double flop() const { return 18.0 * cin * cout * n * h * w; }
};

struct Buffers {
  T *x, *weight, *bias, *packed, *out;
};

Conv3x3Call<T> call_of(const Shape& s, const Buffers& b, int stacked) {
  Conv3x3Call<T> call{};
  call.x = {b.x, {int64_t{s.h} * s.w * s.cin, int64_t{s.w} * s.cin, s.cin}};
  call.out = {b.out, {int64_t{s.h} * s.w * s.cout, int64_t{s.w} * s.cout, s.cout}};
  call.bias = b.bias, call.bias_stride = 1, call.packed = b.packed;
  call.batch = s.n, call.height = s.h, call.width = s.w, call.cin = s.cin, call.cout = s.cout;
  call.upsample = call.pixel_shuffle = 1;
  call.negative_slope = 0.2f, call.scale = call.scale2 = 1.0f;
  call.stacked = stacked;
  return call;
}

void pack(const Launch& launch, const Shape& s, const Buffers& b, int stacked) {
  const PackedLayout layout = packed_layout<TensorCores>(s.cout, stacked);
  pack_weights<T>(launch, {{Parameter<T>::of(b.weight), {int64_t{9} * s.cin, 9, 3, 1}, 0, layout, s.cin, 0, s.cin, layout.padded<T>(s.cin), s.cout, 1, 0}}, b.packed);
}

void fill(const Shape& s, const Buffers& b, bool whole) {
  std::minstd_rand random(1);
  std::normal_distribution<float> normal;
  const auto put = [&](T* to, int64_t count, int most, float scale) {
    std::vector<T> values(std::min<int64_t>(count, 1 << 20));  // repeated in larger pictures
    for (T& v : values) v = __float2bfloat16(whole ? static_cast<float>(static_cast<int>(random() % (2 * most + 1)) - most) : scale * normal(random));
    for (int64_t at = 0; at < count; at += values.size()) {
      CHECK(cudaMemcpy(to + at, values.data(), std::min<int64_t>(values.size(), count - at) * sizeof(T), cudaMemcpyHostToDevice));
    }
  };
  put(b.x, s.inputs(), 2, 1.0f);
  put(b.weight, int64_t{9} * s.cin * s.cout, 1, 1.0f / (3.0f * std::sqrt(static_cast<float>(s.cin))));
  put(b.bias, s.cout, 3, 0.1f);
}

template <class Run>
double microseconds(cudaStream_t stream, Run run) {
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kLaunches; ++i) run();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&replay, graph, 0));
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kRounds + 2; ++i) {
    CHECK(cudaEventRecord(start, stream));
    CHECK(cudaGraphLaunch(replay, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, start, end));
    if (i >= 2) times.push_back(ms);
  }
  CHECK(cudaGraphExecDestroy(replay));
  CHECK(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e3 / kLaunches;
}

std::vector<T> result(const Shape& s, const Buffers& b) {
  CHECK(cudaDeviceSynchronize());
  std::vector<T> values(s.outputs());
  CHECK(cudaMemcpy(values.data(), b.out, values.size() * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

void row(const Shape& s, const std::string& name, int64_t differing, double us) {
  static const char* between = "";
  std::printf("%s\n{\"cin\": %d, \"cout\": %d, \"image\": [%d, %d, %d], \"variant\": \"%s\", ", between, s.cin, s.cout, s.n, s.h, s.w, name.c_str());
  std::printf("\"differing\": %lld, \"us\": %.2f, \"tflops\": %.1f}", static_cast<long long>(differing), us, s.flop() / us / 1e6);
  between = ",";
}

template <class Tile>
void measure(const Shape& s, const Buffers& b, cudaStream_t stream, const std::vector<T>& expected) {
  if (conv3x3_tile_columns(s.cout) != Tile::columns) return;
  const Launch launch{stream, true};
  const auto run = [&] { hopper::convolve_tiles<Tile>(launch, call_of(s, b, Tile::groups), NoSink{}); };
  fill(s, b, true);
  pack(launch, s, b, Tile::groups);
  CHECK(cudaMemset(b.out, 0xff, s.outputs() * sizeof(T)));
  run();
  const std::vector<T> got = result(s, b);
  int64_t differing = 0;
  for (size_t i = 0; i < got.size(); ++i) differing += std::memcmp(&got[i], &expected[i], sizeof(T)) != 0;
  fill(s, b, false);
  pack(launch, s, b, Tile::groups);
  const double us = microseconds(stream, run);
  const std::string layout = Tile::Halo::planes ? "unswizzled" : "swizzle64";
  row(s, "N=" + std::to_string(Tile::pixels) + " " + std::to_string(Tile::width) + "x" + std::to_string(Tile::rows) + " " + layout, differing, us);
}

template <Swizzle SWIZZLE>
void measure_all(const Shape& s, const Buffers& b, cudaStream_t stream, const std::vector<T>& expected) {
  measure<WgmmaTile<1, 3, 12, 3, 1, SWIZZLE>>(s, b, stream, expected);
  measure<WgmmaTile<1, 2, 16, 2, 2, SWIZZLE>>(s, b, stream, expected);
  measure<WgmmaTile<1, 2, 18, 3, 1, SWIZZLE>>(s, b, stream, expected);
  measure<WgmmaTile<1, 2, 24, 3, 1, SWIZZLE>>(s, b, stream, expected);
  measure<WgmmaTile<1, 2, 32, 3, 1, SWIZZLE>>(s, b, stream, expected);
  measure<WgmmaTile<2, 3, 6, 3, 1, SWIZZLE>>(s, b, stream, expected);
  measure<WgmmaTile<2, 2, 12, 2, 2, SWIZZLE>>(s, b, stream, expected);
  measure<WgmmaTile<2, 2, 16, 3, 1, SWIZZLE>>(s, b, stream, expected);
  measure<WgmmaTile<2, 2, 18, 3, 1, SWIZZLE>>(s, b, stream, expected);
  measure<WgmmaTile<2, 2, 24, 2, 1, SWIZZLE>>(s, b, stream, expected);
}

void run(const Shape& s) {
  Buffers b{};
  const auto allocate = [](T*& to, int64_t count) { CHECK(cudaMalloc(&to, count * sizeof(T))); };
  allocate(b.x, s.inputs()), allocate(b.out, s.outputs()), allocate(b.weight, int64_t{9} * s.cin * s.cout), allocate(b.bias, s.cout);
  allocate(b.packed, int64_t{4} * 9 * (s.cin + 64) * (s.cout + 64));
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  const Launch launch{stream, false};
  const auto convolution = [&] { convolve<TensorCores>(launch, call_of(s, b, 0)); };
  fill(s, b, true);
  pack(launch, s, b, 0);
  convolution();
  const std::vector<T> expected = result(s, b);
  fill(s, b, false);
  pack(launch, s, b, 0);
  row(s, "mma.sync", 0, microseconds(stream, convolution));
  measure_all<Swizzle::none>(s, b, stream, expected);
  measure_all<Swizzle::span64>(s, b, stream, expected);
  CHECK(cudaStreamDestroy(stream));
  for (T* memory : {b.x, b.out, b.weight, b.bias, b.packed}) CHECK(cudaFree(memory));
}

}  // namespace

int main() {
  constexpr int kChannels[][2] = {{64, 64}, {64, 32}, {96, 32}, {128, 32}, {160, 32}, {192, 64}};
  constexpr int kImages[][3] = {{16, 48, 48}, {1, 256, 256}, {1, 540, 960}};
  std::printf("{\"rows\": [");
  for (const auto& image : kImages) {
    for (const auto& channels : kChannels) run({channels[0], channels[1], image[0], image[1], image[2]});
  }
  std::printf("]}\n");
  return 0;
}
