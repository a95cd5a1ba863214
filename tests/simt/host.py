"""Compiles a test module (`<name>.cpp` here) that runs CUDA kernel text on the CPU, and imports it.

Another kernel needs another `<name>.cpp` of some twenty lines, as conv3x3.cpp: it fills the kernel's argument struct and hands
`simt::Launcher` to the same host code that gets the CUDA launcher in the library.

Modules know nothing of torch: tensors go in as addresses and strides. They are built once per source text into
`build/simt/` of the source tree, or into a temporary folder where that cannot be written.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.building import one_process_at_a_time

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

UNDEFINED = ("-fsanitize=undefined", "-static-libubsan")
ADDRESS = ("-fsanitize=address", "-fno-omit-frame-pointer", "-DSIMT_ADDRESS")


@functools.cache
def compiler() -> str:
    """g++; without it, Python.h or pybind11 the test is skipped."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("needs the package g++")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("needs Python.h (python3-dev)")
    pytest.importorskip("pybind11", reason="needs the package pybind11")
    return found


def _folder() -> Path:
    folder = HERE.parents[1] / "build" / "simt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="fastsr-simt-"))


@functools.cache
def built(name: str, sanitizer: tuple[str, ...] = UNDEFINED) -> Path:
    """The path of the compiled module."""
    gxx = compiler()
    import pybind11

    texts = sorted([*HERE.glob("include/**/*.*"), *CSRC.glob("cuda/**/*.cuh"), *CSRC.glob("common/*.h"), HERE / f"{name}.cpp"])
    machine = subprocess.run([gxx, "-march=native", "-Q", "--help=target"], capture_output=True, text=True, check=False).stdout
    includes = [HERE / "include", CSRC, sysconfig.get_path("include"), pybind11.get_include()]
    options = ["-std=c++20", "-O1", "-g1", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    options += [*sanitizer, f"-DSIMT_MODULE={name}", *(f"-I{folder}" for folder in includes), "-include", "simt.h"]
    key = hashlib.sha256(" ".join([gxx, machine, sysconfig.get_config_var("EXT_SUFFIX") or "", pybind11.__version__, *options]).encode())
    for text in texts:
        key.update(text.read_bytes())
    stem = f"{name}-{'address' if sanitizer is ADDRESS else 'undefined'}-"
    target = _folder() / f"{stem}{key.hexdigest()[:24]}.so"
    with one_process_at_a_time(target.with_name(stem)):
        if not target.exists():
            unfinished = target.with_suffix(".tmp")
            done = subprocess.run([gxx, *options, "-o", unfinished, HERE / f"{name}.cpp"], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{name}.cpp does not compile:\n{done.stderr[-6000:]}"
            unfinished.replace(target)  # whole: an earlier compilation may have been stopped
            for stale in target.parent.glob(f"{stem}*.so"):
                if stale != target:
                    stale.unlink(missing_ok=True)
    return target


@functools.cache
def module(name: str) -> ModuleType:
    """The module, compiled with the undefined-behaviour sanitizer, imported into this process."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(built(name)))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


def run_alone(name: str, script: str, sanitizer: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run `script`, which sees numpy and the module compiled with a sanitizer, in a process of its own."""
    path = built(name, sanitizer)
    head = (
        "import importlib.machinery, importlib.util, numpy\n"
        f"loader = importlib.machinery.ExtensionFileLoader({name!r}, {str(path)!r})\n"
        f"{name} = importlib.util.module_from_spec(importlib.util.spec_from_loader({name!r}, loader))\n"
        f"loader.exec_module({name})\n"
    )
    env = dict(os.environ)
    if sanitizer is ADDRESS:
        runtime = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
        if not Path(runtime).is_absolute():
            pytest.skip("needs libasan.so, which comes with gcc")
        # Python's own allocator would hide overruns of small buffers; what the interpreter keeps until its end is no leak.
        env |= {"LD_PRELOAD": runtime, "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([sys.executable, "-c", head + script], env=env, capture_output=True, text=True, check=False)
