"""A case module for the tests of the harness: one honest runner, and one for each way of going wrong."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import torch

from fastsr.bench.case import BASELINE, Builder, Call, Case, Runner, State, Unavailable, corner
from fastsr.bench.suite import Options


def _honest(state: State) -> Call:
    return lambda x: torch.relu(x * state["scale"])


def _wrong(state: State) -> Call:
    def call(x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x * state["scale"])
        y[-1, -1, -1, -1] += 1e-3  # one element of a corner
        return y

    return call


def _nan(state: State) -> Call:
    return lambda x: torch.full_like(x, torch.nan)


def _cached(state: State) -> Call:
    """Hands out its first answer again."""
    kept: list[torch.Tensor] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        if not kept:
            kept.append(torch.relu(x * state["scale"]))
        return kept[0]

    return call


def _lazy(state: State) -> Call:
    """Right while it is judged, then does nothing and hands out what it has."""
    calls, kept = 0, torch.empty(0)

    def call(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls, kept
        calls += 1
        if calls <= 3:
            kept = torch.relu(x * state["scale"])
        return kept

    return call


def _wrong_stream(state: State) -> Call:
    """Works on a stream of its own and waits for nobody."""
    if not torch.cuda.is_available():
        raise Unavailable("streams need a GPU")
    side = torch.cuda.Stream()

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(side):
            return torch.relu(x * state["scale"])

    return call


def _late(state: State) -> Call:
    """Hands out its answer before it has computed it, as a runner on a stream of its own does."""

    def call(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        threading.Timer(0.05, lambda: y.copy_(torch.relu(x * state["scale"]))).start()
        return y

    return call


def _no_op(state: State) -> Call:
    """Hands out memory that it never wrote."""
    return lambda x: torch.empty_like(x).fill_(0.25)


def _small_pages(state: State) -> Call:
    """Right where torch was told to ask for no huge pages."""
    return _honest(state) if os.environ["THP_MEM_ALLOC_ENABLE"] == "0" else _no_op(state)


def _crashing(state: State) -> Call:
    def call(x: torch.Tensor) -> torch.Tensor:
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
        return x

    return call


def _raising(state: State) -> Call:
    raise RuntimeError("no such kernel\nmore text")


def _missing(state: State) -> Call:
    raise Unavailable("the peer is not installed")


def _hanging(state: State) -> Call:
    time.sleep(600)
    raise AssertionError("nobody stopped this")


RUNNERS = {
    BASELINE: _honest,
    "wrong": _wrong,
    "nan": _nan,
    "cached": _cached,
    "lazy": _lazy,
    "late": _late,
    "no-op": _no_op,
    "wrong stream": _wrong_stream,
    "small pages": _small_pages,
    "crashing": _crashing,
    "raising": _raising,
    "missing": _missing,
    "hanging": _hanging,
}


def _wrong_from(side: int, amount: float) -> Builder:
    """Right on pictures of fewer pixels a side; on larger ones a single element is off by `amount`."""

    def build(state: State) -> Call:
        def call(x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(x * state["scale"])
            if x.shape[-1] >= side:
                y[-1, -1, -1, -1] += amount
            return y

        return call

    return build


def _wrong_when_small(state: State) -> Call:
    """Right on whole pictures; on the crop one row is missing."""

    def call(x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x * state["scale"])
        if x.shape[-1] == CROP:
            y[:, :, -1] = 0
        return y

    return call


def _half_of_large(state: State) -> Call:
    """Computes the upper half of a large picture twice, as a tile that is forgotten would look."""

    def call(x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x * state["scale"])
        half = x.shape[-2] // 2
        return torch.cat([y[..., :half, :], y[..., :half, :]], -2) if x.shape[-1] > CROP else y

    return call


#: Pixels a side of the cropped case's pictures and of their crops.
LARGE, CROP = 32, 8

CROPPED_RUNNERS = {
    BASELINE: _honest,
    "wrong when large": _wrong_from(LARGE, 1e-4),
    "nan when large": _wrong_from(LARGE, float("nan")),
    "wrong when small": _wrong_when_small,
    "half of large": _half_of_large,
    "cached": _cached,
    "lazy": _lazy,
    "hanging when large": _hanging,
}


def cases(options: Options) -> list[Case]:
    """One small case, and one whose float64 is said to be dear."""
    return [
        _case(options, "2x3x8x8", 8, RUNNERS),
        replace(_case(options, "2x3x32x32 cropped", LARGE, CROPPED_RUNNERS), crop=corner(CROP, flops=1e15)),
    ]


def _case(options: Options, label: str, side: int, runners: Mapping[str, Builder]) -> Case:
    shape = (2, 3, side, side)
    return Case(
        suite="ops",
        subject="scaled_relu",
        label=label,
        device=options.device,
        dtype=options.dtypes[0],
        sizes={"n": 2, "h": side, "w": side},
        flops=float(math.prod(shape)),
        bytes=8.0 * math.prod(shape),
        state=lambda generator: {"scale": torch.rand(1, generator=generator) + 0.5},
        inputs=lambda generator: (torch.randn(shape, generator=generator),),
        eager=_honest,
        runners={name: Runner(build) for name, build in runners.items()},
    )
