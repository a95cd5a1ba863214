// What limits a kernel on this GPU, beside its arithmetic: L2 reads, launches inside a graph, clusters that fit.
//
//   l2_read      every block reads the same buffer of a few MiB again and again (16 bytes a lane, L1 bypassed), GB/s
//   graph_node   a graph of 1000 dependent empty kernels: microseconds from one to the next
//   clusters     cudaOccupancyMaxActiveClusters for clusters of 8 and 16 blocks and several amounts of shared memory
//
// Prints one JSON object. nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a device_limits.cu
#include <cuda_runtime.h>

#include <algorithm>
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

__global__ void fill(uint4* data, size_t n) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x)
    data[i] = make_uint4(static_cast<unsigned>(i) * 2654435761u, 1, 2, 3);
}

// Every block starts at another place, so that no two ask for the same line at once.
__global__ void __launch_bounds__(512) read_all(const uint4* data, size_t n, int rounds, unsigned* out) {
  unsigned sum = 0;
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (int r = 0; r < rounds; ++r) {
    size_t i = (blockIdx.x + static_cast<size_t>(r)) % gridDim.x * blockDim.x + threadIdx.x;
    for (; i + 3 * stride < n; i += 4 * stride) {
      const uint4 a = __ldcg(data + i), b = __ldcg(data + i + stride), c = __ldcg(data + i + 2 * stride), d = __ldcg(data + i + 3 * stride);
      sum += a.x ^ b.x ^ c.x ^ d.x;
    }
    for (; i < n; i += stride) sum += __ldcg(data + i).x;
  }
  if (sum == 0x12345678u) *out = sum;  // practically never, but the compiler cannot know
}

__global__ void empty() {}

__global__ void with_shared(int* out) {
  extern __shared__ int shared[];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (out) out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

template <class Run>
double median_ms(Run run, cudaStream_t stream, int repeats = 15) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < repeats + 2; ++i) {
    CHECK(cudaEventRecord(start, stream));
    run();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, start, end));
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int main() {
  int device = 0;
  CHECK(cudaSetDevice(device));
  cudaDeviceProp p;
  CHECK(cudaGetDeviceProperties(&p, device));
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  std::printf("{\"gpu\": \"%s\", \"multiprocessors\": %d, \"l2_bytes\": %d", p.name, p.multiProcessorCount, p.l2CacheSize);

  std::printf(", \"l2_read\": {");
  unsigned* out = nullptr;
  CHECK(cudaMalloc(&out, sizeof *out));
  const char* comma = "";
  for (const size_t mib : {4, 8, 16, 24, 32, 1024}) {  // the last is far beyond the cache: device memory
    const size_t bytes = mib << 20, n = bytes / sizeof(uint4);
    uint4* data = nullptr;
    CHECK(cudaMalloc(&data, bytes));
    fill<<<p.multiProcessorCount * 4, 512, 0, stream>>>(data, n);
    CHECK(cudaGetLastError());
    const int rounds = mib > 64 ? 1 : 64;
    const double ms = median_ms([&] { read_all<<<p.multiProcessorCount * 4, 512, 0, stream>>>(data, n, rounds, out); }, stream);
    std::printf("%s\"%zu MiB\": %.1f", comma, mib, static_cast<double>(bytes) * rounds / ms / 1e6);
    comma = ", ";
    CHECK(cudaFree(data));
  }
  std::printf("}");

  std::printf(", \"graph_node_us\": {");
  comma = "";
  for (const int blocks : {1, p.multiProcessorCount, p.multiProcessorCount * 8}) {
    constexpr int kNodes = 1000;
    cudaGraph_t graph;
    cudaGraphExec_t runnable;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kNodes; ++i) empty<<<blocks, 128, 0, stream>>>();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&runnable, graph, 0));
    const double ms = median_ms([&] { CHECK(cudaGraphLaunch(runnable, stream)); }, stream);
    std::printf("%s\"%d blocks\": %.3f", comma, blocks, ms * 1e3 / kNodes);
    comma = ", ";
    CHECK(cudaGraphExecDestroy(runnable));
    CHECK(cudaGraphDestroy(graph));
  }
  const double launches = median_ms([&] { for (int i = 0; i < 1000; ++i) empty<<<p.multiProcessorCount, 128, 0, stream>>>(); }, stream);
  std::printf("}, \"launch_us\": %.3f", launches);  // 1000 launches: milliseconds are microseconds each

  std::printf(", \"clusters\": {");
  comma = "";
  if (p.major >= 9) {
    for (const int size : {8, 16}) {
      for (const int kib : {16, 64, 113, 160, 227}) {
        CHECK(cudaFuncSetAttribute(with_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, kib * 1024));
        CHECK(cudaFuncSetAttribute(with_shared, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
        cudaLaunchConfig_t config = {};
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(size);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.gridDim = dim3(static_cast<unsigned>(size * p.multiProcessorCount));
        config.blockDim = dim3(256);
        config.dynamicSmemBytes = static_cast<size_t>(kib) * 1024;
        config.attrs = &attribute;
        config.numAttrs = 1;
        int clusters = -1;
        const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, with_shared, &config);
        if (status != cudaSuccess) (void)cudaGetLastError(), clusters = -1;
        std::printf("%s\"%d blocks, %d KiB\": %d", comma, size, kib, clusters);
        comma = ", ";
      }
    }
  }
  std::printf("}}\n");
  return 0;
}
