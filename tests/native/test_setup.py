"""What setup.py decides: toolkit, architectures, compiler. Each run stops at `--help`, after the decisions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in a source tree")


def decide(tmp_path: Path, nvcc: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py with a PATH that holds only a compiler and the given nvcc script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is not None and environment.pop("COMPILER", "1") == "1":
        (folder / "g++").symlink_to(compiler)
    if nvcc is not None:
        (folder / "nvcc").write_text("#!/bin/sh\n" + nvcc)
        (folder / "nvcc").chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "FASTSR_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX")}
    env = {**kept, "PATH": str(folder), **environment}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--help"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def toolkit(tmp_path: Path, version: str = "12.8") -> str:
    """A wrapper in another folder than its toolkit, as a script: only `--dryrun` tells where that is."""
    top = tmp_path / "elsewhere"
    (top / "include").mkdir(parents=True)
    (top / "lib64").mkdir()
    (top / "include" / "cuda_runtime.h").touch()
    (top / "lib64" / "libcudart_static.a").touch()
    return f'case "$*" in *--dryrun*) echo "#$ TOP={top}" >&2;; *) echo "Cuda compilation tools, release {version}, V{version}.1";; esac\n'


def test_no_nvcc_builds_without_cuda(tmp_path):
    done = decide(tmp_path, None)
    assert done.returncode == 0
    assert "building without CUDA: no nvcc on the PATH" in done.stderr


def test_cuda_demanded_but_missing_is_an_error(tmp_path):
    done = decide(tmp_path, None, FASTSR_CUDA="1")
    assert done.returncode != 0
    assert "FASTSR_CUDA=1, but no nvcc" in done.stderr


def test_an_old_nvcc_is_refused(tmp_path):
    done = decide(tmp_path, toolkit(tmp_path, "11.8"))
    assert done.returncode == 0
    assert "is 11.8; expected 12.4 or newer" in done.stderr


def test_the_toolkit_is_where_nvcc_says(tmp_path):
    done = decide(tmp_path, toolkit(tmp_path), TORCH_CUDA_ARCH_LIST="7.5;8.0;9.0a+PTX")
    assert done.returncode == 0, done.stderr
    assert "leaving out 7.5" in done.stderr
    assert "CUDA 12.8 for 8.0 9.0a+PTX (TORCH_CUDA_ARCH_LIST)" in done.stderr


def test_a_wrong_architecture_is_named(tmp_path):
    done = decide(tmp_path, toolkit(tmp_path), TORCH_CUDA_ARCH_LIST="hopper")
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST has 'hopper'" in done.stderr


def test_no_compiler_installs_without_the_library(tmp_path):
    done = decide(tmp_path, None, COMPILER="0")
    assert done.returncode == 0
    assert "no C++ compiler: installing without the native library" in done.stderr
