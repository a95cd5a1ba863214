"""The PTX in the CUDA building blocks assembles, also where no kernel of the library uses it yet; needs nvcc, no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

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
template __global__ void conv3x3_kernel<float, Tile>(ConvInput<float>, ConvWeights<float>, ConvBias<float>, Conv3x3Epilogue<float>);
}  // namespace fastsr::cuda
"""


def test_every_building_block_assembles_without_spills(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    source = tmp_path / "blocks.cu"
    source.write_text(SOURCE)
    command = [nvcc, "-cubin", "-arch=sm_80", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-I{CSRC}"]
    command += ["--keep", "--keep-dir", str(tmp_path), "-o", str(tmp_path / "blocks.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 2, done.stderr
    ptx = (tmp_path / "blocks.ptx").read_text()
    for kind in ("x1", "x2", "x4", "x1.trans", "x2.trans", "x4.trans"):
        assert f"ldmatrix.sync.aligned.m8n8.{kind}.shared.b16" in ptx
    assert "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" in ptx
    assert "cvt.rna.tf32.f32" in ptx
