"""What a figure depends on beside the code: machine, versions, settings."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastsr import _native
from fastsr._version import __version__

#: Variables that change times; recorded if they are set.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "FASTSR_BACKEND",
    "FASTSR_CPU_ISA",
    "FASTSR_NATIVE",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "LD_PRELOAD",
    "MALLOC_CONF",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "THP_MEM_ALLOC_ENABLE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_INTERPRET",
)
PACKAGES = (
    "torch", "triton", "numpy", "openvino", "onnxruntime", "onnx", "ncnn", "faiss-cpu", "faiss-gpu", "vector-quantize-pytorch",
    "flash-kmeans", "torch-tensorrt",
)  # fmt: skip


def record(threads: int | None = None) -> dict[str, Any]:
    """Everything above as plain JSON; nothing here fails where something is missing."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fastsr": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := version_of(name))},
        "cpu": cpu(),
        "threads": threads or torch.get_num_threads(),
        "load": load(),
        "huge_pages": huge_pages(),
        "native": {"missing": _native.missing, "isa": _native.cpu_isa(), **_native.build},
        "gpu": gpu(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Model, cores this process may use, memory, and the instruction sets that matter here."""
    model, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    memory = 0
    with contextlib.suppress(OSError, ValueError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
    return {"model": model, "cores": cores, "memory_bytes": memory, "flags": [flag for flag in known if flag in flags]}


def load() -> float | None:
    """How many processes wanted a core during the last minute, on average."""
    with contextlib.suppress(OSError, AttributeError):
        return os.getloadavg()[0]
    return None


def huge_pages() -> str | None:
    """The kernel's transparent huge page mode: always, madvise or never."""
    with contextlib.suppress(OSError):
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return modes[modes.index("[") + 1 : modes.index("]")]
    return None


def gpu() -> dict[str, Any] | None:
    """The GPU that torch would use, or None."""
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "memory_bytes": p.total_memory,
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": getattr(p, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }


def commit() -> str | None:
    """The commit of the source tree around this package, with "+changes" if files differ; None outside of one."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists():
        return None
    head = _command("git", "-C", str(tree), "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if _command("git", "-C", str(tree), "status", "--porcelain", "--untracked-files=no") else "")


def _command(*words: str) -> str | None:
    """The first line that a command prints, or None if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0] or None
