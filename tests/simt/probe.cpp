// Small kernels that test the shim itself, some of them with a fault on purpose.
#include "module.h"

#include "cuda/mma.cuh"

namespace {

using namespace fastsr::cuda;

// One warp: D(16 x 8) = A(16 x K) B(K x 8), A and B^T as rows of 32 bytes in shared memory.
template <class T>
__global__ void multiply_matrices(const unsigned char* a, const unsigned char* b, float* d, bool transposed_b) {
  unsigned char* shared = dynamic_shared<16 * 32 + 256>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 32; i += 32) copy_async_16(shared + i * 16, a + i * 16, 16);
  for (int i = lane; i < 16; i += 32) copy_async_16(shared + 512 + i * 16, b + i * 16, 16);
  commit_copies();
  wait_copies<0>();
  __syncwarp();
  uint32_t fa[4], fb[2];
  float sums[4] = {};
  load_matrices(fa, shared + lane % 16 * 32 + lane / 16 * 16);
  if (transposed_b) {  // B itself as 16 rows of 8 elements
    load_matrices<2, true>(fb, shared + 512 + lane % 16 * 16);
  } else {
    load_matrices(fb, shared + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
  }
  if constexpr (std::is_same_v<T, float>) round_to_tf32(fa), round_to_tf32(fb);
  mma<T>(sums, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// Each lane's registers after ldmatrix of COUNT matrices of 16-bit numbers 0, 1, 2...
template <int COUNT, bool TRANSPOSED>
__global__ void load_numbers(uint32_t* out) {
  __shared__ __align__(16) uint16_t numbers[4 * 64];
  for (int i = threadIdx.x; i < 4 * 64; i += 32) numbers[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t registers[COUNT];
  load_matrices<COUNT, TRANSPOSED>(registers, numbers + threadIdx.x % (8 * COUNT) * 8);
  for (int i = 0; i < COUNT; ++i) out[threadIdx.x * COUNT + i] = registers[i];
}

// Turns 256 numbers round through shared memory; without the barrier it reads what other warps have not written.
template <bool BARRIER>
__global__ void reverse_block(const float* in, float* out) {
  __shared__ float values[256];
  values[threadIdx.x] = in[threadIdx.x];
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = values[255 - threadIdx.x];
}

template <bool BARRIER>
__global__ void reverse_warp(const float* in, float* out) {
  __shared__ float values[32];
  values[threadIdx.x] = in[threadIdx.x];
  if (BARRIER) __syncwarp();
  out[threadIdx.x] = values[31 - threadIdx.x];
}

template <bool WAIT>
__global__ void copy_through_shared(const float* in, float* out) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared<32 * 16>());
  copy_async_16(shared + threadIdx.x * 4, in + threadIdx.x * 4, threadIdx.x == 31 ? 8 : 16);
  commit_copies();
  if (WAIT) wait_copies<0>();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = shared[threadIdx.x * 4 + i];
}

// Two groups in flight: after waiting for all but one, only the first may be read.
__global__ void copy_in_two_groups(const float* in, float* first, float* second) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared<32 * 32>());
  for (int group = 0; group < 2; ++group) {
    copy_async_16(shared + group * 128 + threadIdx.x * 4, in + threadIdx.x * 4, 16);
    commit_copies();
  }
  wait_copies<1>();
  for (int i = 0; i < 4; ++i) first[threadIdx.x * 4 + i] = shared[threadIdx.x * 4 + i], second[threadIdx.x * 4 + i] = shared[128 + threadIdx.x * 4 + i];
}

__global__ void misaligned_copy(const float* in, int shared_offset, int global_offset) {
  copy_async_16(dynamic_shared<64>() + shared_offset, reinterpret_cast<const char*>(in) + global_offset, 16);
}

__global__ void misaligned_load(const float* in, float* out) {
  struct alignas(16) Four {
    float v[4];
  };
  *reinterpret_cast<Four*>(out) = *reinterpret_cast<const Four*>(in);
}

__global__ void misaligned_float(const float* in, float* out) { *out = *in; }

__global__ void warp_functions(int* out) {
  const int lane = threadIdx.x % 32, base = static_cast<int>(threadIdx.x) * 10;
  out[base] = __shfl_sync(0xffffffffu, lane, 5);
  out[base + 1] = __shfl_up_sync(0xffffffffu, lane, 3);
  out[base + 2] = __shfl_down_sync(0xffffffffu, lane, 3, 16);
  out[base + 3] = __shfl_xor_sync(0xffffffffu, lane, 9);
  out[base + 4] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  out[base + 5] = __any_sync(0xffffffffu, lane == 7);
  out[base + 6] = __any_sync(0xffffffffu, lane == 99);
  out[base + 7] = __all_sync(0xffffffffu, lane < 32);
  out[base + 8] = __all_sync(0xffffffffu, lane != 30);
  if (lane < 16) out[base + 9] = __shfl_xor_sync(0x0000ffffu, lane, 1);
}

// The last block of a grid to arrive, and sums by atomics.
__global__ void count_arrivals(float* sum, unsigned* arrived, int* last_seen, int* largest) {
  atomicAdd(sum, 1.0f);
  atomicMax(largest, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
  __shared__ unsigned ticket;
  __syncthreads();
  if (threadIdx.x == 0) ticket = atomicAdd(arrived, 1u);
  __syncthreads();
  if (ticket == gridDim.x - 1) atomicAdd(last_seen, 1);
}

// Not atomic on purpose: between the read and the write others run.
__global__ void count_with_a_race(int* sum) {
  const int before = *sum;
  __syncwarp();
  *sum = before + 1;
}

__global__ void diverging_barrier() {
  if (threadIdx.x < 7) return;
  __syncthreads();
}

__global__ void diverging_warp() {
  if (threadIdx.x == 3) __syncwarp();
  else (void)__ballot_sync(0xffffffffu, 1);
}

__global__ void read_uninitialised(float* out, float* dynamic_out) {
  __shared__ float values[32];
  auto* dynamic = reinterpret_cast<float*>(dynamic_shared<128>());
  out[blockIdx.x * 32 + threadIdx.x] = values[threadIdx.x], dynamic_out[blockIdx.x * 32 + threadIdx.x] = dynamic[threadIdx.x];
  values[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;  // must not reach the next block
}

__global__ void write_shared(int index) { dynamic_shared<64>()[index] = 1; }
__global__ void write_global(float* out, int index) { out[index] = 1.0f; }

template <class T>
void product(uint64_t seed, uintptr_t a, uintptr_t b, uintptr_t d, bool transposed_b) {
  simt::Launcher{seed}(multiply_matrices<T>, 1, 32, 16 * 32 + 256, pointer<const unsigned char>(a), pointer<const unsigned char>(b), pointer<float>(d), transposed_b);
}

template <int COUNT, bool TRANSPOSED>
void numbers(uint64_t seed, uintptr_t out) {
  simt::Launcher{seed}(load_numbers<COUNT, TRANSPOSED>, 1, 32, 0, pointer<uint32_t>(out));
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, m) {
  using simt::Launcher;
  using U = uintptr_t;
  m.def("product_bfloat16", product<__nv_bfloat16>);
  m.def("product_float16", product<__half>);
  m.def("product_tf32", product<float>);
  m.def("ldmatrix_1", numbers<1, false>);
  m.def("ldmatrix_2", numbers<2, false>);
  m.def("ldmatrix_4", numbers<4, false>);
  m.def("ldmatrix_1_trans", numbers<1, true>);
  m.def("ldmatrix_2_trans", numbers<2, true>);
  m.def("ldmatrix_4_trans", numbers<4, true>);
  m.def("reverse_block", [](uint64_t seed, bool barrier, U in, U out) {
    Launcher{seed}(barrier ? reverse_block<true> : reverse_block<false>, 1, 256, 0, pointer<const float>(in), pointer<float>(out));
  });
  m.def("reverse_warp", [](uint64_t seed, bool barrier, U in, U out) {
    Launcher{seed}(barrier ? reverse_warp<true> : reverse_warp<false>, 1, 32, 0, pointer<const float>(in), pointer<float>(out));
  });
  m.def("copy_through_shared", [](uint64_t seed, bool wait, U in, U out) {
    Launcher{seed}(wait ? copy_through_shared<true> : copy_through_shared<false>, 1, 32, 512, pointer<const float>(in), pointer<float>(out));
  });
  m.def("copy_in_two_groups", [](uint64_t seed, U in, U first, U second) {
    Launcher{seed}(copy_in_two_groups, 1, 32, 1024, pointer<const float>(in), pointer<float>(first), pointer<float>(second));
  });
  m.def("misaligned_copy", [](U in, int shared, int global) { Launcher{}(misaligned_copy, 1, 1, 64, pointer<const float>(in), shared, global); });
  m.def("misaligned_load", [](U in, U out) { Launcher{}(misaligned_load, 1, 1, 0, pointer<const float>(in), pointer<float>(out)); });
  m.def("misaligned_float", [](U in, U out) { Launcher{}(misaligned_float, 1, 1, 0, pointer<const float>(in), pointer<float>(out)); });
  m.def("warp_functions", [](uint64_t seed, U out) { Launcher{seed}(warp_functions, 1, 64, 0, pointer<int>(out)); });
  m.def("count_arrivals", [](uint64_t seed, int64_t blocks, int threads, U sum, U arrived, U last, U largest) {
    Launcher{seed}(count_arrivals, blocks, threads, 0, pointer<float>(sum), pointer<unsigned>(arrived), pointer<int>(last), pointer<int>(largest));
  });
  m.def("count_with_a_race", [](uint64_t seed, U sum) { Launcher{seed}(count_with_a_race, 1, 64, 0, pointer<int>(sum)); });
  m.def("diverging_barrier", [] { Launcher{}(diverging_barrier, 1, 64, 0); });
  m.def("diverging_warp", [] { Launcher{}(diverging_warp, 1, 32, 0); });
  m.def("read_uninitialised", [](U out, U dynamic) { Launcher{}(read_uninitialised, 3, 32, 128, pointer<float>(out), pointer<float>(dynamic)); });
  m.def("wrong_shared_size", [] { Launcher{}(write_shared, 1, 1, 32, 0); });
  m.def("write_shared", [](int index) { Launcher{}(write_shared, 1, 1, 64, index); });
  m.def("write_global", [](U out, int index) { Launcher{}(write_global, 1, 1, 0, pointer<float>(out), index); });
}
