"""The roofs: the highest arithmetic and copy rates of this machine, measured in the same run as everything else.

CPU: a small native module (`benchmarks/native/roofs.cpp`, no torch in it), compiled when it is first needed and kept in
the user's cache folder; it runs in a process of its own. GPU: a large copy and a large matrix product through torch.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsr.bench import cases as cases_package
from fastsr.bench import process

#: {"arithmetic float32": {"value", "unit", "how", "samples"}, "copy": {...}, "copy in L2": {..., "bytes"}} or {"missing": reason}
Roofs = dict[str, Any]

SECONDS, REPEATS = 0.05, 5  # of each measurement; the best counts, since a neighbour only ever slows one down
COPY_BYTES = 256 << 20  # read and written by all threads together: far more than any cache keeps
USUAL_L2 = 512 << 10  # where the system does not tell

# Runs where nothing but the probe is loaded.
_SCRIPT = """
import importlib.util, json, sys
path, threads, seconds, repeats = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
copies = {
    "copy": (int(sys.argv[5]), ("memcpy", "non-temporal stores")),
    "copy in L2": (int(sys.argv[6]), ("memcpy", "avx2", "avx512")),
}
spec = importlib.util.spec_from_file_location("fastsr_roofs", path)
probe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(probe)
out = {"arithmetic float32": {}, "arithmetic bfloat16": {}, "copy": {}, "copy in L2": {}}
for turn in range(repeats):
    for dtype in ("float32", "bfloat16"):
        for isa in probe.instruction_sets(dtype)[: 1 if dtype == "float32" else 2]:
            out["arithmetic " + dtype].setdefault(isa, []).append(probe.arithmetic(isa, threads, seconds))
    for name, (size, ways) in copies.items() if turn % 2 == 0 else ():
        for how in filter(probe.ways_to_copy().__contains__, ways):
            out[name].setdefault(how, []).append(probe.copy(threads, size // threads // 2, how, seconds))
print(json.dumps(out))
"""


class NotMeasured(RuntimeError):
    """The probe cannot be compiled or run here; the message says why and what would help."""


def measure_cpu(threads: int | None = None, seconds: float = SECONDS) -> Roofs:
    """The roofs of `threads` threads (None for every core this process may use)."""
    threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        library = compiled()
        in_cache = threads * l2_bytes() // 2
        words = [sys.executable, "-I", "-c", _SCRIPT, str(library), *map(str, (threads, seconds, REPEATS, COPY_BYTES, in_cache))]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (NotMeasured, subprocess.TimeoutExpired) as error:
        return {"missing": str(error)}
    if done.returncode:
        return {"missing": f"the roof probe failed: {done.stderr.strip()[-300:]}"}
    found = {}
    for name, values in json.loads(done.stdout).items():
        if values:
            how = max(values, key=lambda way: max(values[way]))
            unit = "GB/s" if name.startswith("copy") else "GFLOP/s"
            found[name] = {"value": max(values[how]), "unit": unit, "how": f"{how}, {threads} threads", "samples": [values]}
    found["copy in L2"]["bytes"] = threads * l2_bytes()
    return found


def l2_bytes() -> int:
    """The L2 cache of one core."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            if (index / "level").read_text().strip() == "2":
                return int((index / "size").read_text().strip().removesuffix("K")) << 10
    return USUAL_L2


def better(a: Roofs, b: Roofs) -> Roofs:
    """The higher value of each roof, with the samples of both."""
    if not a or "missing" in a or "missing" in b:
        return b if not a or "missing" in a else a
    best = {}
    for name in a:
        higher = a[name] if a[name]["value"] >= b[name]["value"] else b[name]
        best[name] = {**higher, "samples": a[name]["samples"] + b[name]["samples"]}
    return best


@functools.cache
def compiled() -> Path:
    """The compiled probe, from the cache or made now.

    Raises:
        NotMeasured: no source, compiler, Python.h or pybind11, or the compiler refused.
    """
    source = next((p for folder in cases_package.__path__ if (p := Path(folder, "native", "roofs.cpp")).is_file()), None)
    if source is None:
        raise NotMeasured("benchmarks/native/roofs.cpp is not installed")
    compiler = os.environ.get("CXX", "").split() or [found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        raise NotMeasured(f"no C++ compiler{f' {compiler[0]!r}' if compiler else ''}: install g++ to have roofs")
    try:
        import pybind11
    except ImportError:
        raise NotMeasured("pybind11 is not installed: pip install pybind11") from None
    headers = sysconfig.get_paths()["include"]
    if not Path(headers, "Python.h").is_file():
        raise NotMeasured(f"{headers} has no Python.h: install Python's headers (python3-dev)")
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", f"-I{headers}", f"-I{pybind11.get_include()}"]
    banner = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256("\0".join([source.read_text(), banner, *compiler, *flags, sysconfig.get_config_var("EXT_SUFFIX") or ""]).encode())
    target = cache_folder() / f"fastsr_roofs-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # moved when complete: two runs may compile at once
        made = Path(folder) / "fastsr_roofs.so"
        done = subprocess.run([*compiler, *flags, str(source), "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotMeasured(f"{compiler[0]} refused roofs.cpp: {done.stderr.strip()[-500:] or f'exit code {done.returncode}'}")
        os.replace(made, target)
    return target


def cache_folder() -> Path:
    """Where compiled probes are kept: $XDG_CACHE_HOME/fastsr (~/.cache/fastsr), else a temporary folder."""
    wanted = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsr"
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        if os.access(wanted, os.W_OK):
            return wanted
    except OSError:
        pass
    # Never a predictable name in a folder that others can write to: the library would be loaded from there.
    folder = tempfile.mkdtemp(prefix="fastsr-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def measure_gpu(dtypes: Sequence[str], timeout: float = 180) -> Roofs:
    """The roofs of the GPU, in a process of its own: copy, and a matrix product in each dtype under torch's own settings."""
    script = process.NOT_FROM_HERE + "from fastsr.bench import roofs; roofs.main()"
    words = [sys.executable, "-c", script, *dict.fromkeys(("float32", "bfloat16", *dtypes))]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, env=process.environment(None, {}))
    except subprocess.TimeoutExpired:
        return {"missing": f"the GPU's roofs took more than {timeout:g} s"}
    if done.returncode:
        return {"missing": f"the GPU's roofs failed: {done.stderr.strip()[-300:]}"}
    found: Roofs = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def gpu_roofs(dtypes: Sequence[str], size: int = 8192, copy_bytes: int = 2 << 30) -> Roofs:
    """Measure in this process: medians of 20 events each, on random data (zeros run faster)."""
    import torch

    from fastsr.bench.statistics import median

    def milliseconds(run: Any, repeats: int = 20) -> list[float]:
        for _ in range(3):
            run()
        samples = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end))
        return samples

    found: Roofs = {}
    source = torch.randn(copy_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    samples = [2 * copy_bytes / t / 1e6 for t in milliseconds(functools.partial(target.copy_, source))]
    found["copy"] = {"value": median(samples), "unit": "GB/s", "how": f"copy of {copy_bytes >> 20} MiB", "samples": samples}
    del source, target
    # The cases are convolutions: the float32 product may use TF32 exactly where they may.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    for name in dtypes:
        dtype = getattr(torch, name)
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        samples = [2 * size**3 / t / 1e6 for t in milliseconds(functools.partial(torch.mm, a, b, out=out))]
        how = f"{size} x {size} x {size} product"
        if name == "float32":
            how += f", TF32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}"
        found[f"arithmetic {name}"] = {"value": median(samples), "unit": "GFLOP/s", "how": how, "samples": samples}
    return found


def main() -> None:
    """Print the GPU's roofs for the dtypes on the command line."""
    print(json.dumps(gpu_roofs(sys.argv[1:])))
