// Two questions about Hopper's warpgroup products, for a 3x3 convolution that keeps its halo tile in shared memory.
//
//   A = weights, M = 64 output channels; B = pixels, N = 144 or 256; K = 64 input channels, 4 steps of 16
//
//   shift        A tap of the convolution is the same tile, read from a pixel further on. Does a B descriptor whose start
//                address is shifted by pixel rows (128 bytes) inside a 128-byte-swizzled tile read what it should, and
//                with which base offset? Also for the plain layout [channels/8][pixel][8], where a pixel is 16 bytes.
//   throughput   TFLOP/s of all SMs when 9 taps x 4 steps run over one tile, for N = 144 and 256, both layouts
//
//   shared memory   A: 9 taps x 64 rows x 128 bytes = 72 KiB    B: (N + 64) pixels x 128 bytes, aligned to 1024
//   swizzle         the 16-byte chunk c of the row at address a lies at chunk c ^ ((a >> 7) & 7)
//
// Predicted: with base offset 0 every shift reads correctly if the hardware swizzles absolute addresses.   Not measured yet.
// Prints one JSON object. nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a wgmma.cu
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                                \
  do {                                                                                             \
    const cudaError_t status_ = (call);                                                            \
    if (status_ != cudaSuccess) {                                                                  \
      std::fprintf(stderr, "%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status_)); \
      std::exit(1);                                                                                \
    }                                                                                              \
  } while (0)

namespace {

using bf16 = __nv_bfloat16;
constexpr int kM = 64, kK = 64, kTaps = 9, kHalo = 64;  // kHalo: pixels beyond N that a shift may reach
constexpr int kRow = kK * 2;                            // bytes of one pixel or one weight row
constexpr int kMaxN = 256;

enum Layout { kSwizzled = 0, kPlain = 1 };

// PTX's matrix descriptor: address, leading and stride offsets in units of 16 bytes, base offset, swizzle mode.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride, uint32_t base, uint32_t mode) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(address) | field(leading) << 16 | field(stride) << 32 | static_cast<uint64_t>(base & 7) << 49 |
         static_cast<uint64_t>(mode) << 62;
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wait() { asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory"); }

// d += a x b, both operands in shared memory with K contiguous.
__device__ __forceinline__ void mma(float (&d)[72], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n144k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71"
      "}, %72, %73, 1, 1, 1, 0, 0;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
      : "l"(a), "l"(b));
}

__device__ __forceinline__ void mma(float (&d)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, 1, 1, 1, 0, 0;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
      : "l"(a), "l"(b));
}

// Where element (row, k) lies in a tile of `rows` rows.
__device__ __forceinline__ int place(int layout, int row, int k, int rows) {
  if (layout == kSwizzled) return row * kRow + (((k / 8) ^ (row & 7)) * 16) + (k % 8) * 2;
  return (k / 8) * rows * 16 + row * 16 + (k % 8) * 2;
}

// The descriptor of K step `step` of a tile, `shift` rows further on.
__device__ __forceinline__ uint64_t tile(int layout, uint32_t base, int rows, int shift, int step, int base_offset) {
  if (layout == kSwizzled) return descriptor(base + shift * kRow + step * 32, 16, 8 * kRow, base_offset, 1);
  // Plain: the next 8 channels lie `rows` x 16 bytes further, the next 8 rows 128 bytes.
  return descriptor(base + shift * 16 + step * 2 * rows * 16, rows * 16, 128, 0, 0);
}

template <int N>
struct Shared {
  static constexpr int kRows = N + kHalo;
  static constexpr int kA = kTaps * kM * kRow, kB = kRows * kRow;
  static constexpr int kBytes = kA + kB + 1024;  // the last for alignment
};

// Loads weights[tap][m][k] and pixels[p][k] into shared memory and returns the two addresses.
template <int N>
__device__ void load(const bf16* weights, const bf16* pixels, int layout, uint32_t& a, uint32_t& b) {
  extern __shared__ unsigned char raw[];
  const uint32_t start = (static_cast<uint32_t>(__cvta_generic_to_shared(raw)) + 1023) / 1024 * 1024;
  unsigned char* aligned = raw + (start - static_cast<uint32_t>(__cvta_generic_to_shared(raw)));
  constexpr int kRows = Shared<N>::kRows;
  for (int i = threadIdx.x; i < kTaps * kM * kK; i += blockDim.x) {
    const int tap = i / (kM * kK), m = i / kK % kM, k = i % kK;
    *reinterpret_cast<bf16*>(aligned + tap * kM * kRow + place(layout, m, k, kM)) = weights[i];
  }
  for (int i = threadIdx.x; i < kRows * kK; i += blockDim.x)
    *reinterpret_cast<bf16*>(aligned + Shared<N>::kA + place(layout, i / kK, i % kK, kRows)) = pixels[i];
  asm volatile("fence.proxy.async;\n" ::: "memory");  // plain stores become visible to wgmma
  __syncthreads();
  a = start;
  b = start + Shared<N>::kA;
}

// One warpgroup: out[m][n] = sum over k of weights[0][m][k] * pixels[n + shift][k].
template <int N>
__global__ void __launch_bounds__(128) shifted(const bf16* weights, const bf16* pixels, float* out, int layout, int shift, int base_offset) {
  uint32_t a, b;
  load<N>(weights, pixels, layout, a, b);
  float d[N / 2] = {};
  fence();
  for (int step = 0; step < kK / 16; ++step)
    mma(d, tile(layout, a, kM, 0, step, 0), tile(layout, b, Shared<N>::kRows, shift, step, base_offset));
  commit();
  wait();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < N / 2; ++i) {
    const int m = warp * 16 + lane / 4 + (i % 4 / 2) * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
    out[m * N + n] = d[i];
  }
}

// Two warpgroups a block, each with its own accumulators over the same tile.
template <int N>
__global__ void __launch_bounds__(256) throughput(const bf16* weights, const bf16* pixels, float* out, int layout, int rounds) {
  uint32_t a, b;
  load<N>(weights, pixels, layout, a, b);
  float d[N / 2] = {};
  for (int r = 0; r < rounds; ++r) {
    fence();
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
      for (int step = 0; step < kK / 16; ++step)
        mma(d, tile(layout, a + tap * kM * kRow, kM, 0, step, 0), tile(layout, b, Shared<N>::kRows, tap, step, 0));
    commit();
    wait();
  }
  float sum = 0;
  for (float x : d) sum += x;
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

float random_value(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int>(state >> 8) - (1 << 23)) / (1 << 23);
}

struct Problem {
  std::vector<bf16> weights, pixels;
  bf16 *device_weights, *device_pixels;
  float* out;
};

template <int N>
float shift_error(const Problem& p, int layout, int shift, int base_offset) {
  CHECK(cudaMemset(p.out, 0xff, sizeof(float) * kM * N));  // NaN: an element that nobody writes is seen
  shifted<N><<<1, 128, Shared<N>::kBytes>>>(p.device_weights, p.device_pixels, p.out, layout, shift, base_offset);
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  std::vector<float> got(kM * N);
  CHECK(cudaMemcpy(got.data(), p.out, sizeof(float) * got.size(), cudaMemcpyDeviceToHost));
  float worst = 0;
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < N; ++n) {
      double sum = 0;
      for (int k = 0; k < kK; ++k)
        sum += double{__bfloat162float(p.weights[m * kK + k])} * double{__bfloat162float(p.pixels[(n + shift) * kK + k])};
      const float error = std::fabs(got[m * N + n] - static_cast<float>(sum));
      if (!(error <= worst)) worst = std::isnan(error) ? 1e30f : error;
    }
  return worst;
}

template <int N>
void run(const Problem& p, int multiprocessors, const char* comma) {
  CHECK(cudaFuncSetAttribute(shifted<N>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared<N>::kBytes));
  CHECK(cudaFuncSetAttribute(throughput<N>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared<N>::kBytes));
  std::printf("%s\"N=%d\": {\"shifts\": [", comma, N);
  const char* between = "";
  for (const int layout : {kSwizzled, kPlain})
    for (const int shift : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 50, 51}) {
      std::printf("%s{\"layout\": \"%s\", \"shift\": %d, \"correct_base_offsets\": [", between, layout == kSwizzled ? "swizzle128" : "plain", shift);
      const char* inner = "";
      float best = 1e30f;
      for (int base = 0; base < (layout == kSwizzled ? 8 : 1); ++base) {
        const float error = shift_error<N>(p, layout, shift, base);
        best = std::min(best, error);
        if (error < 1e-3f) std::printf("%s%d", inner, base), inner = ", ";
      }
      std::printf("], \"least_error\": %.3g}", best);
      between = ", ";
    }
  std::printf("], \"throughput\": {");
  between = "";
  for (const int layout : {kSwizzled, kPlain})
    for (const int blocks : {1, 2}) {
      int fit = 0;
      CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, throughput<N>, 256, Shared<N>::kBytes));
      if (blocks > fit) continue;
      constexpr int kRounds = 400;
      cudaEvent_t start, end;
      CHECK(cudaEventCreate(&start));
      CHECK(cudaEventCreate(&end));
      std::vector<float> times;
      for (int i = 0; i < 9; ++i) {
        CHECK(cudaEventRecord(start));
        throughput<N><<<blocks * multiprocessors, 256, Shared<N>::kBytes>>>(p.device_weights, p.device_pixels, p.out, layout, kRounds);
        CHECK(cudaGetLastError());
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, start, end));
        if (i >= 2) times.push_back(ms);
      }
      std::sort(times.begin(), times.end());
      const double flops = 2.0 * kM * N * kK * kTaps * kRounds * 2 * blocks * multiprocessors;
      std::printf("%s\"%s, %d blocks per SM\": %.1f", between, layout == kSwizzled ? "swizzle128" : "plain", blocks, flops / times[times.size() / 2] / 1e9);
      between = ", ";
    }
  std::printf("}}");
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  if (properties.major != 9) {
    std::fprintf(stderr, "wgmma needs compute capability 9.0; this GPU has %d.%d\n", properties.major, properties.minor);
    return 3;
  }
  Problem p;
  uint32_t state = 1;
  for (int i = 0; i < kTaps * kM * kK; ++i) p.weights.push_back(__float2bfloat16(random_value(state)));
  for (int i = 0; i < (kMaxN + kHalo) * kK; ++i) p.pixels.push_back(__float2bfloat16(random_value(state)));
  CHECK(cudaMalloc(&p.device_weights, p.weights.size() * sizeof(bf16)));
  CHECK(cudaMalloc(&p.device_pixels, p.pixels.size() * sizeof(bf16)));
  CHECK(cudaMemcpy(p.device_weights, p.weights.data(), p.weights.size() * sizeof(bf16), cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(p.device_pixels, p.pixels.data(), p.pixels.size() * sizeof(bf16), cudaMemcpyHostToDevice));
  CHECK(cudaMalloc(&p.out, sizeof(float) * std::max(kM * kMaxN, 2 * 256 * properties.multiProcessorCount)));
  std::printf("{\"gpu\": \"%s\", \"unit\": \"TFLOP/s\", ", properties.name);
  run<144>(p, properties.multiProcessorCount, "");
  run<256>(p, properties.multiProcessorCount, ", ");
  std::printf("}\n");
  return 0;
}
