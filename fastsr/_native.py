"""The native library `_C.so`: found, loaded and described here. Importing this module never raises.

The library is built against libtorch's stable ABI, holds no Python code and registers its operators
under `torch.ops.fastsr`. It is optional: without it every op still runs on the reference backend.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("_C.so")

#: Instruction sets of the CPU kernels, best first. `FASTSR_CPU_ISA` names the best one that may be used.
CPU_ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")

REMEDY = "install fastsr where a C++ compiler is present: pip install --no-build-isolation ."


def _load() -> str | None:
    """Load the library; the return value says why that failed, or None."""
    if os.environ.get("FASTSR_NATIVE", "1") == "0":
        return "FASTSR_NATIVE=0 forbids it"
    if not PATH.exists():
        return f"{PATH.name} was not built with this installation"
    try:
        torch.ops.load_library(str(PATH))
    except Exception as error:  # a library for another torch or machine must not break `import fastsr`
        return f"{PATH} does not load: {error}"
    return None


#: Why the library is missing, or None when it is loaded.
missing: str | None = _load()

#: What the library was built for: {"version", "compiler", "cuda" (or null), "cuda_archs", "cpu_isas"}.
build: dict[str, Any] = {} if missing else json.loads(torch.ops.fastsr.build_info())


def offers(*operators: str) -> bool:
    """True if the library holds these operators. One that lacks any was built from older sources and counts as missing."""
    global missing
    absent = [name for name in operators if missing is None and not hasattr(torch.ops.fastsr, name)]
    if absent:
        missing = f"{PATH} was built from other sources (it has no {absent[0]}); build it again"
    return missing is None


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use now; None without the library."""
    return None if missing else torch.ops.fastsr.cpu_isa()


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that this processor and this build offer, best first."""
    return tuple(build.get("cpu_isas", ()))


@contextlib.contextmanager
def use_cpu_isa(isa: str) -> Iterator[None]:
    """Use at most `isa` inside the block; for tests and benchmarks (process-wide, not per thread)."""
    if missing:
        raise RuntimeError(f"the native library is missing: {missing}")
    before = torch.ops.fastsr.cpu_isa()
    torch.ops.fastsr.set_cpu_isa(isa)
    try:
        yield
    finally:
        torch.ops.fastsr.set_cpu_isa(before)
