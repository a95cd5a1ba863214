"""Which backend runs an op on a tensor, and why: one table, one function.

Every op offers up to three backends under one name:

    reference   plain PyTorch: any device, any dtype, double backward; the truth for every test
    compiled    the native library (C++ on a CPU, CUDA C++ on an NVIDIA GPU)
    triton      Triton kernels (NVIDIA and AMD GPUs; Triton's interpreter on a CPU, for tests)

`auto` walks an op's rules from top to bottom and takes the first whose conditions hold and whose backend
can run here. A rule is frozen data that records its reason; nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastsr import _native

Backend = Literal["auto", "compiled", "triton", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)

#: The low-precision and single-precision dtypes that fused kernels take; float64 is the reference's.
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Rule:
    """One line of an op's table: where its conditions hold, `auto` takes `backend`, because of `reason`."""

    backend: str
    reason: str
    device: str | None = None  # a device type, or None for any
    dtypes: tuple[torch.dtype, ...] | None = None  # None for any
    when: Callable[..., bool] | None = None  # a condition on the tensors, or None for any

    def covers(self, device: str, dtype: torch.dtype) -> bool:
        """True if the rule speaks about this device type and dtype."""
        return self.device in (None, device) and (self.dtypes is None or dtype in self.dtypes)


class Choice(NamedTuple):
    """A backend and the reason why it was taken."""

    backend: str
    reason: str


#: op -> its rules. Each op's `op.py` adds its own with `register`.
TABLE: dict[str, tuple[Rule, ...]] = {}

#: (op, backend) -> the device types on which that kernel exists.
KERNELS: dict[tuple[str, str], tuple[str, ...]] = {}


def register(op: str, *, rules: tuple[Rule, ...], compiled: tuple[str, ...] = (), triton: tuple[str, ...] = ()) -> None:
    """Add an op: its rules, and the device types for which it has compiled and Triton kernels."""
    TABLE[op] = (*rules, Rule("reference", "runs anywhere"))
    KERNELS[op, "compiled"] = compiled
    KERNELS[op, "triton"] = triton


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    return name


_default: str = _checked(os.environ.get("FASTSR_BACKEND", "auto"))


class set_backend:
    """Set the backend that `backend="auto"` stands for, for the whole process; also a context manager.

    Called as a function the setting stays; in a `with` statement the old one comes back at the end:

        fastsr.set_backend("reference")
        with fastsr.set_backend("triton"):
            ...
    """

    def __init__(self, name: Backend) -> None:
        global _default
        self._before = _default
        _default = _checked(name)

    def __enter__(self) -> set_backend:
        return self

    def __exit__(self, *_: object) -> None:
        global _default
        _default = self._before


def default_backend() -> str:
    """What `backend="auto"` stands for now; "auto" itself unless it was set."""
    return _default


def autocasts(device: str) -> bool:
    """True if autocast is on for this device type."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error}); pip install triton"
    return None


def triton_interpreted() -> bool:
    """True where Triton kernels run in Triton's interpreter (`TRITON_INTERPRET=1`, set before the first import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `op` on tensors of this device type and dtype; None if it can."""
    if backend == "reference":
        return None
    if dtype not in FUSED_DTYPES:
        return f"{dtype} is served by the reference alone"
    if device not in KERNELS.get((op, backend), ()):
        return f"{op} has no {backend} kernel for device type {device!r}"
    if backend == "compiled":
        if _native.missing:
            return f"the native library is missing: {_native.missing}; {_native.REMEDY}"
        if device == "cuda":
            return _cuda_missing(op)
        return None
    if missing := triton_missing():
        return missing
    if device == "cpu" and not triton_interpreted():
        return "Triton runs on a CPU in its interpreter only; set TRITON_INTERPRET=1 before starting Python"
    return None


def _cuda_missing(op: str) -> str | None:
    if not _native.build.get("cuda"):
        return "the native library was built without CUDA; install fastsr where nvcc (12.4 or newer) is on the PATH"
    if torch.version.hip is not None:
        return "the native library has no kernels for AMD GPUs; the Triton backend has"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the CUDA kernels of {op} need compute capability 8.0 or higher; this GPU has {major}.{minor}"
    return None


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def choose(op: str, requested: str, x: Tensor, *others: Tensor) -> Choice:
    """The backend that runs `op` on `x`, and why.

    Raises:
        ValueError: `requested` is no backend's name.
        BackendUnavailable: a backend was named (here, by `set_backend` or by FASTSR_BACKEND) and cannot run.
    """
    name = _checked(requested)
    if name == "auto":
        name = _default
    device, dtype = x.device.type, x.dtype
    if name != "auto":
        reason = why_not(op, name, device, dtype)
        if reason:
            raise BackendUnavailable(f"{op}: backend {name!r} cannot run here: {reason}")
        return Choice(name, "asked for by name")
    passed_over = None
    for rule in TABLE[op]:
        if not rule.covers(device, dtype):
            continue
        if rule.when is not None and not rule.when(x, *others):
            continue
        reason = why_not(op, rule.backend, device, dtype)
        if reason is None:
            if passed_over and not torch.compiler.is_compiling():
                _say_once(f"{op} on {device} falls back to the {rule.backend} backend: {passed_over}")
            return Choice(rule.backend, rule.reason)
        if rule.backend == "compiled":
            passed_over = reason
    raise AssertionError("the reference ends every table")


def considered(op: str, device: str, dtype: torch.dtype) -> list[tuple[Rule, str | None]]:
    """The rules that `auto` looks at for this device type and dtype, each with why its backend cannot run here.

    The list ends with the first rule that can run and asks for nothing more (`when` is None): that, or one that
    can run before it, is what `auto` takes.
    """
    looked_at = []
    for rule in TABLE[op]:
        if rule.covers(device, dtype):
            looked_at.append((rule, why_not(op, rule.backend, device, dtype)))
            if looked_at[-1][1] is None and rule.when is None:
                break
    return looked_at
