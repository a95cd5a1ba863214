"""What every Triton kernel of the package shares: its GPU family, precision, strides and ahead-of-time cases."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsr.backends import triton_interpreted
from fastsr.kernels.precision import takes_tf32

Line = TypeVar("Line")

#: What the configuration tables may distinguish: mma.sync (sm_80 to sm_89, sm_120), wgmma (sm_90), tcgen05 (sm_100), AMD's matrix cores.
FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942")

#: Shared memory that one block may own, in bytes (sm_86, sm_89 and sm_120 hold 101,376, so tables of "sm_80" stay below that).
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


def family(device: torch.device) -> str:
    """The row of the configuration tables that serves `device`; the interpreter takes that of sm_80."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    # sm_120 has neither wgmma nor tcgen05, and the shared memory of sm_86.
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def precision(x: Tensor) -> str:
    """How products of x's dtype are formed: "half", "tf32" or "ieee" (as torch's own switch for convolutions says)."""
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if takes_tf32(x) else "ieee"


def modes(gpu: str) -> tuple[tuple[str, str], ...]:
    """The precisions that a family has products for, each with Triton's name of a dtype."""
    half = (("half", "bf16"), ("half", "fp16"))
    return (*half, ("ieee", "fp32")) if gpu.startswith("gfx") else (*half, ("tf32", "fp32"), ("ieee", "fp32"))


def of_family(table: Mapping[tuple[str, str], Line], gpu: str, mode: str) -> Line:
    """What a configuration table holds for a family and a precision: the family's own entry, or that of its vendor."""
    own = (gpu, mode)
    return table[own if own in table else ("amd" if gpu.startswith("gfx") else "nvidia", mode)]


def current_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make x's GPU the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def dots_are_float32() -> bool:
    """True in the interpreter, whose bfloat16 `tl.dot` is silently wrong; kernels then widen the operands first."""
    return triton_interpreted()


def stride_unit(*tensors: Tensor | None) -> int:
    """The elements of 16 bytes if all strides between pixels are multiples of that, else 1.

    Kernels take strides divided by this number and multiply by it again as a constant: that proves to Triton that
    rows of channels can move 16 bytes at a time, without a recompilation for each value of a stride.
    """
    unit = 1
    for tensor in tensors:
        if tensor is not None:
            unit = 16 // tensor.element_size()
            if any(tensor.shape[d] > 1 and tensor.stride(d) % unit for d in (0, 2, 3)):
                return 1
    return unit


def pixel_strides(tensor: Tensor | None, unit: int) -> tuple[int, int, int]:
    """Strides of images, rows and pixels in `unit` elements; 0 where there is one index only, or no tensor."""
    if tensor is None:
        return 0, 0, 0
    n, _, h, w = (stride // unit if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return n, h, w


def instructions(gpu: str, mode: str, vector_loads: bool) -> tuple[str, ...]:
    """What a matrix product's assembly must hold: the family's matrix units and, with `vector_loads`, asynchronous 16-byte copies."""
    if gpu == "gfx942":
        return ("v_mfma",)
    wanted = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}[gpu] if mode != "ieee" else "fma.rn.f32"
    return (wanted, "cp.async.cg") if vector_loads else (wanted,)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a kernel's configuration holds beside its tile."""

    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """How Triton shall compile it."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class AotCase:
    """One specialisation of a kernel, to be compiled ahead of time without a GPU.

    A module `triton.py` of an op offers `aot_cases()`, which yields one of these for each family and line of its table.
    """

    name: str
    family: str
    kernel: Any
    signature: Mapping[str, str]  # argument -> Triton type ("*bf16", "i32", "fp32"); constants are left out
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]  # pointers that are multiples of 16 bytes
    options: Mapping[str, Any]  # "num_warps", "num_stages" and so on
    instructions: tuple[str, ...] = ()  # the assembly must hold them: matrix units in use, 16 bytes at a time
