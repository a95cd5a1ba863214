"""The resource ledger: its arithmetic, its parsers, and that what is committed has no spills and covers every kernel file."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks" / "ledger.py").exists(), reason="runs in a source tree")


@pytest.fixture(scope="module")
def ledger() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastsr_ledger", ROOT / "benchmarks" / "ledger.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        ("sm_80", 256, 128, 0, (2, 0.25, "registers")),  # 65536 / (256 * 128)
        ("sm_80", 256, 32, 0, (8, 1.0, "registers")),
        ("sm_80", 128, 65, 0, (7, 0.438, "registers")),  # 72 by the step of 256 a warp: 28 warps
        ("sm_90a", 128, 32, 112 * 1024, (2, 0.125, "shared memory")),  # 113 KB each with the reserved one, of 228
        ("sm_80", 128, 32, 112 * 1024, (1, 0.062, "shared memory")),
        ("sm_86", 128, 32, 99 * 1024, (1, 0.083, "shared memory")),
        ("sm_86", 128, 32, 100 * 1024, (0, 0.0, "shared memory")),
        ("sm_86", 32, 16, 0, (16, 0.333, "blocks")),
        ("sm_120", 1024, 32, 0, (1, 0.667, "threads")),
    ],
)
def test_occupancy(ledger, arch, threads, registers, shared, expected):
    assert ledger.occupancy(arch, threads, registers, shared) == expected


def test_the_compilers_output_is_read(ledger):
    ptxas = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstv' for 'sm_80'
ptxas info    : Function properties for _Z5firstv
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers
"""
    assert ledger.read_ptxas(ptxas) == [("_Z5firstv", "sm_80", 20, 255, 1024), ("_Z6secondv", "sm_90a", 0, 16, 0)]
    ptx = """.visible .entry _Z5firstv(
.param .u64 p)
.maxntid 256
.minnctapersm 2
{
	// dynamic shared memory: 57600 bytes
}
.visible .entry _Z6secondv(
.maxntid 128, 1, 1
{
}
"""
    assert ledger.read_ptx(ptx) == {"_Z5firstv": (256, 57600), "_Z6secondv": (128, 0)}


def test_differences_are_found(ledger, capsys):
    release, rows = ledger.read_ledger()
    assert ledger.differences(release, rows) == []
    changed = ledger.Row(**{**vars(rows[0]), "registers": rows[0].registers + 1})
    assert len(ledger.differences(release, [changed, *rows[1:]])) == 1
    assert ledger.differences("0.0.0", [changed, *rows[1:]]) == []
    assert "comparing spills only" in capsys.readouterr().out
    spilling = ledger.Row(**{**vars(rows[0]), "spills": 4})
    assert len(ledger.differences("0.0.0", [spilling, *rows[1:]])) == 1
    assert len(ledger.differences(release, rows[1:])) == 1


def test_every_kernel_file_is_recorded_for_every_architecture_without_spills(ledger):
    _, rows = ledger.read_ledger()
    recorded: dict[str, set[str]] = {}
    for row in rows:
        recorded.setdefault(row.file, set()).add(row.arch)
        assert row.spills == 0, row
        assert row.blocks > 0, f"cannot launch: {row}"
        assert row.blocks == ledger.occupancy(row.arch, row.threads, row.registers, row.static_shared + row.dynamic_shared)[0]
    files = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert recorded == {name: set(ledger.LIMITS) for name in files}


def test_every_kernel_names_its_launch_bounds():
    """Without them ptxas assumes 1024 threads, and the ledger knows no occupancy."""
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        text = re.sub(r"//.*", "", path.read_text())
        assert len(re.findall(r"__global__", text)) == len(re.findall(r"__global__\s+void\s+__launch_bounds__", text)), path.name


def test_no_operator_waits_for_the_device_or_allocates_beside_torch():
    """What a CUDA graph cannot hold: each of these waits for the device, or asks the driver for memory."""
    forbidden = r"cuda\w*Synchronize|cudaMemcpy\w*|cudaMalloc\w*|cudaFree\w*|cudaStreamQuery|cudaEventQuery"
    for path in sorted((ROOT / "csrc" / "cuda").rglob("*.cu*")):
        assert not re.findall(forbidden, re.sub(r"//.*", "", path.read_text())), path.name
