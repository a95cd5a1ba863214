"""The PTX in the CUDA building blocks assembles, also where no kernel of the library uses it yet; needs nvcc, no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).resolve().parents[2] / "csrc"

SOURCE = """
#include "cuda/conv3x3.cuh"
namespace fastsr::cuda {

template <int COUNT, bool TRANSPOSED>
__device__ void load(unsigned char* shared, uint32_t* out) {
  uint32_t registers[COUNT];
  load_matrices<COUNT, TRANSPOSED>(registers, shared + threadIdx.x * 16);
  for (int i = 0; i < COUNT; ++i) *out++ = registers[i];
}
__global__ void loads(uint32_t* out) {
  unsigned char* shared = dynamic_shared<512>();
  load<1, false>(shared, out), load<2, false>(shared, out + 1), load<4, false>(shared, out + 3);
  load<1, true>(shared, out + 7), load<2, true>(shared, out + 8), load<4, true>(shared, out + 10);
  wait_copies<3>();
}
// The convolution with tf32 products.
using Tile = ConvTile<16, 32, 128, 4, 2>;
template __global__ void conv3x3_kernel<float, Tile, NoSink>(
    ConvInput<float>, ConvWeights<float>, ConvBias<float>, Conv3x3Epilogue<float, NoSink>);
}  // namespace fastsr::cuda
"""

#: Each shape and type of wgmma, each copy of the tensor memory accelerator, and the barriers.
HOPPER_SOURCE = """
#include "cuda/hopper/enabled.cuh"
#include "cuda/hopper/tensor_map.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/hopper/wgmma.cuh"
namespace fastsr::cuda::hopper {

template <class T, int N>
__global__ void __launch_bounds__(128) products(float* out) {
  unsigned char* memory = dynamic_shared<65536>();
  fence_async_proxy();
  __syncthreads();
  float sums[N / 2];
  fence();
  for (int k = 0; k < 2; ++k) {
    const uint64_t a = tile_descriptor(Swizzle::span128, shared_address(memory), k * 32);
    multiply<T, N>(sums, a, matrix_descriptor(Swizzle::none, shared_address(memory), 128, N * 16), k > 0);
  }
  commit();
  wait<0>(sums);
  for (int i = 0; i < N / 2; ++i) out[fragment_row(threadIdx.x, i) * N + fragment_column(threadIdx.x, i)] = sums[i];
}
#define PRODUCTS(n) template __global__ void products<__half, n>(float*); template __global__ void products<__nv_bfloat16, n>(float*); \\
  template __global__ void products<float, n>(float*);
PRODUCTS(48) PRODUCTS(64) PRODUCTS(96) PRODUCTS(128) PRODUCTS(144) PRODUCTS(192) PRODUCTS(256)

template <int DIMS>
__device__ void box(unsigned char* memory, const CUtensorMap& map, Barrier& barrier) {
  int at[DIMS] = {};
  copy_box(memory, map, at, barrier);
}
__global__ void __launch_bounds__(128) copies(const __grid_constant__ CUtensorMap map, const void* from, float* out) {
  unsigned char* memory = dynamic_shared<65536>();
  Barrier& barrier = *reinterpret_cast<Barrier*>(memory + 49152);
  if (threadIdx.x == 0) {
    barrier.init(2);
    fence_barriers();
    prefetch_map(map);
    barrier.arrive_expecting(6 * 4096);
    box<2>(memory, map, barrier), box<3>(memory, map, barrier), box<4>(memory, map, barrier), box<5>(memory, map, barrier);
    copy_bulk(memory, from, 4096, barrier), copy_bulk_to_all(memory, from, 4096, barrier, 3);
  }
  barrier.arrive();
  barrier.wait(0);
  out[threadIdx.x] = reinterpret_cast<const float*>(memory)[threadIdx.x];
}

CUtensorMap host(const float* data) {
  return enabled(0) ? tensor_map(data, {64, 100, 7}, {64, 6400}, {32, 16, 1}, Swizzle::span128) : CUtensorMap();
}
}  // namespace fastsr::cuda::hopper
"""


def assembled(folder: Path, text: str, arch: str, kernels: int) -> str:
    """The PTX of `text`, which must assemble for an architecture without spills or any other remark of ptxas."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc of the CUDA toolkit")
    source = folder / "blocks.cu"
    source.write_text(text)
    virtual = arch.replace("sm", "compute")
    command = [nvcc, "-cubin", f"-gencode=arch={virtual},code={arch}", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
    command += [f"-I{CSRC}", *(f"-I{path}" for path in include_paths())]
    command += ["--keep", "--keep-dir", str(folder), "-o", str(folder / "blocks.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == kernels, done.stderr
    assert "warning" not in done.stderr, done.stderr
    assert "erializ" not in done.stderr, done.stderr
    return (folder / "blocks.ptx").read_text()


def test_every_building_block_assembles_without_spills(tmp_path):
    ptx = assembled(tmp_path, SOURCE, "sm_80", kernels=2)
    for kind in ("x1", "x2", "x4", "x1.trans", "x2.trans", "x4.trans"):
        assert f"ldmatrix.sync.aligned.m8n8.{kind}.shared.b16" in ptx
    assert "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" in ptx
    assert "cvt.rna.tf32.f32" in ptx


def test_every_building_block_of_hopper_assembles_without_spills(tmp_path):
    ptx = assembled(tmp_path, HOPPER_SOURCE, "sm_90a", kernels=22)
    for types in ("k16.f32.f16.f16", "k16.f32.bf16.bf16", "k8.f32.tf32.tf32"):
        for n in (48, 64, 96, 128, 144, 192, 256):
            assert f"wgmma.mma_async.sync.aligned.m64n{n}{types}" in ptx
    for dims in (2, 3, 4, 5):
        assert f"cp.async.bulk.tensor.{dims}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes" in ptx
