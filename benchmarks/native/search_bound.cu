// Searches for violations of the code search's bound: products of float16 rows by mma.sync against float64.
//
//   search_bound          prints JSON: for each depth and family of operands, the largest |product - exact| / (c_D |x'| |e'|)
//
// c_D is tensor_core_error of csrc/common/vq_bound.h, in which the tensor cores' sums are certified; a ratio above 1 breaks it, and
// 1 / ratio is what the constant may be lowered by. "modelled" is the same against ceil(D / 16) (17 * 2^-25 + 2^-23), the first-order
// model of the H100 (arXiv 2512.07004). A warp multiplies 16 rows by 8 codes, as the search does, in steps of 16 values.
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/vq_bound.h"
#include "cuda/mma.cuh"

namespace {

constexpr int kRows = 16, kCodes = 8, kBlocks = 4096, kMostDepth = 1024;
const char* const kFamilies[] = {"uniform", "positive", "exponents", "cancelling", "one large, products below its last bit", "large in every step"};

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

__device__ float random(uint64_t i) {  // splitmix64, in [0, 1)
  i += 0x9e3779b97f4a7c15u;
  i = (i ^ (i >> 30)) * 0xbf58476d1ce4e5b9u;
  i = (i ^ (i >> 27)) * 0x94d049bb133111ebu;
  return static_cast<float>((i ^ (i >> 31)) >> 40) * 0x1p-24f;
}

// Value d of vector `vector` of a family, below 1 in magnitude as the search scales them.
__device__ __half value(int family, uint64_t vector, int d, int depth) {
  const float u = random(2 * (vector * kMostDepth + d)), v = random(2 * (vector * kMostDepth + d) + 1), sign = v < 0.5f ? -1.0f : 1.0f;
  switch (family) {
    case 0: return __float2half_rn(2 * u - 1);
    case 1: return __float2half_rn(u);
    case 2: return __float2half_rn(sign * exp2f(-14 * u));
    case 3: {  // the second half takes the first away again, but for the last bits
      const int half = depth / 2, partner = d < half ? d : d - half;
      const float w = random(2 * (vector * kMostDepth + partner)) * (1 + (d < half ? 0.0f : 0x1p-9f * (v - 0.5f)));
      return __float2half_rn(d >= half && vector % 2 ? -w : w);
    }
    case 4: return __float2half_rn(d == 0 ? 1 - u / 16 : 0x1p-12f * (0.7f + 0.7f * u));
    default: return __float2half_rn(d % 16 == 0 ? sign * (1 - u / 16) : 0x1p-12f * (0.7f + 0.7f * u) * (d % 32 < 16 ? 1.0f : -1.0f));
  }
}

// A block is a warp; the largest ratio over its 128 products. Vectors of rows have even numbers, those of codes odd ones.
__global__ void __launch_bounds__(32) worst_ratio(int family, int depth, uint64_t seed, float* ratios) {
  __shared__ __half x[kRows][kMostDepth], e[kCodes][kMostDepth];
  const uint64_t first = (seed * gridDim.x + blockIdx.x) * 2 * kRows;
  for (int i = threadIdx.x; i < kRows * depth; i += 32) x[i / depth][i % depth] = value(family, first + 2 * (i / depth), i % depth, depth);
  for (int i = threadIdx.x; i < kCodes * depth; i += 32) e[i / depth][i % depth] = value(family, first + 2 * (i / depth) + 1, i % depth, depth);
  __syncwarp();
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  float sums[4] = {};
  for (int k = 0; k < depth; k += 16) {
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const uint32_t*>(&x[g + i % 2 * 8][k + 2 * q + i / 2 * 8]);
    for (int i = 0; i < 2; ++i) b[i] = *reinterpret_cast<const uint32_t*>(&e[g][k + 2 * q + i * 8]);
    fastsr::cuda::mma<__half>(sums, a, b[0], b[1]);
  }
  float worst = 0;
  for (int i = 0; i < 4; ++i) {
    const __half *row = x[g + i / 2 * 8], *code = e[2 * q + i % 2];
    double exact = 0, xx = 0, ee = 0;
    for (int d = 0; d < depth; ++d) {
      const double v = __half2float(row[d]), w = __half2float(code[d]);
      exact += v * w, xx += v * v, ee += w * w;
    }
    const double ratio = fabs(sums[i] - exact) / (fastsr::vq::tensor_core_error(depth) * sqrt(xx * ee));
    worst = fmaxf(worst, ratio < 1e30 ? static_cast<float>(ratio) : 1e30f);  // NaN too is a finding
  }
  for (int step = 16; step > 0; step /= 2) worst = fmaxf(worst, __shfl_xor_sync(0xffffffffu, worst, step));
  if (threadIdx.x == 0) ratios[blockIdx.x] = worst;
}

}  // namespace

int main() {
  float* device = nullptr;
  check(cudaMalloc(&device, kBlocks * sizeof(float)), "cudaMalloc");
  std::vector<float> ratios(kBlocks);
  float largest = 0;
  long long products = 0;
  std::printf("{\"rows\": [");
  const char* comma = "";
  for (const int depth : {16, 32, 64, 128, 256, 512, 1024}) {
    const double modelled = (depth + 15) / 16 * (17 * 0x1p-25 + 0x1p-23), bound = fastsr::vq::tensor_core_error(depth);
    for (int family = 0; family < 6; ++family) {
      float worst = 0;
      for (uint64_t seed = 0; seed < 16; ++seed) {
        worst_ratio<<<kBlocks, 32>>>(family, depth, seed, device);
        check(cudaGetLastError(), "worst_ratio");
        check(cudaMemcpy(ratios.data(), device, kBlocks * sizeof(float), cudaMemcpyDeviceToHost), "cudaMemcpy");
        for (const float ratio : ratios) worst = std::fmax(worst, ratio);
        products += static_cast<long long>(kBlocks) * kRows * kCodes;
      }
      std::printf("%s{\"depth\": %d, \"operands\": \"%s\", \"ratio\": %.6g, \"modelled\": %.6g}", comma, depth, kFamilies[family], worst,
                  worst * bound / modelled);
      comma = ", ";
      largest = std::fmax(largest, worst);
    }
  }
  std::printf("], \"products\": %lld, \"largest_ratio\": %.6g}\n", products, largest);
  return 0;
}
