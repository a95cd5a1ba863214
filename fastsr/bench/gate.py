"""The correctness gate: a runner whose answer is worse than plain PyTorch's is reported, and never timed.

For every output y of a call, with y64 from the eager computation in float64 on the same numbers:

    1. e(y)    = max |y - y64| / max |y64|, over the tensor; for images (the first output's shape or the first input's) also
                 the largest such ratio of a plane (image, channel), its max |y64| counting as at least 1/16 of the tensor's
    2. allowed = 2 * e(eager in the same dtype) + 2 * eps(dtype), eager's e being the larger of NCHW and channels-last
    3. the runner passes if e(y) <= allowed, on every set of inputs
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsr.bench.case import Builder, Call, Case, Inputs, State, to_layout

#: Two sets, so that a runner which hands out its first answer again is caught.
GATE_SEEDS = (9001, 9002)
STATE_SEED = 7
HOLD_CYCLES = 40_000_000


@dataclass(frozen=True)
class Verdict:
    """What the gate found: the worst error over outputs and input sets, and what was allowed there."""

    passed: bool
    error: float
    allowed: float
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def draw_state(case: Case, dtype: torch.dtype) -> State:
    """The case's weights: rounded to the case's dtype first, so that float64 sees the same numbers."""
    state = case.state(torch.Generator().manual_seed(STATE_SEED))
    low = _dtype(case)
    return {name: tensor.to(low).to(case.device, dtype) for name, tensor in state.items()}


def draw_inputs(case: Case, seed: int, dtype: torch.dtype, channels_last: bool = False) -> Inputs:
    """A fresh set of inputs, rounded to the case's dtype first."""
    low = _dtype(case)
    drawn = case.inputs(torch.Generator().manual_seed(seed))
    return to_layout(tuple(t.to(low).to(case.device, dtype) if t.is_floating_point() else t.to(case.device) for t in drawn), channels_last)


def prepare(case: Case, path: Path) -> None:
    """Compute the truth and eager's error for every set of inputs, and keep both in `path` for the runners."""
    low = _dtype(case)
    kept = []
    for seed in GATE_SEEDS:
        truth = [y.cpu() for y in _outputs(case.eager, case, seed, torch.float64)]
        images = {truth[0].shape, draw_inputs(case, seed, low)[0].shape}
        planes = [t.dim() == 4 and t.shape in images for t in truth]
        # Both layouts are plain PyTorch, with different algorithms and errors beneath.
        by_layout = [
            [errors(y.cpu(), t, p) for y, t, p in zip(_outputs(case.eager, case, seed, low, channels_last), truth, planes, strict=True)]
            for channels_last in (False, True)
        ]
        plain = [(max(a[0], b[0]), max(a[1], b[1])) for a, b in zip(*by_layout, strict=True)]
        kept.append((truth, planes, plain))
    torch.save(kept, path)


def judge(case: Case, call: Call, path: Path, sets: list[Inputs] | None = None, channels_last: bool = True) -> Verdict:
    """Put every gate input through `call` and compare. With `sets`, the numbers are copied into those tensors first,
    so that the very storages which were timed are judged again."""
    eps = torch.finfo(_dtype(case)).eps
    worst = Verdict(True, 0.0, math.inf)
    for index, (seed, (truth, planes, plain)) in enumerate(zip(GATE_SEEDS, torch.load(path), strict=True)):
        inputs = draw_inputs(case, seed, _dtype(case), channels_last)
        if sets:
            hold_stream(case.device)
            for mine, drawn in zip(sets[index % len(sets)], inputs, strict=True):
                mine.copy_(drawn)
            inputs = sets[index % len(sets)]
        answer = call(*inputs)
        outputs = answer if isinstance(answer, tuple) else (answer,)
        if len(outputs) != len(truth):
            return Verdict(False, math.inf, 0.0, f"{len(outputs)} outputs; expected {len(truth)}")
        for number, (y, t, p, allowances) in enumerate(zip(outputs, truth, planes, plain, strict=True)):
            if y.shape != t.shape:
                return Verdict(False, math.inf, 0.0, f"output {number} has shape {tuple(y.shape)}; expected {tuple(t.shape)}")
            for what, e, e_plain in zip(("tensor", "worst plane"), errors(y.detach().cpu(), t, p), allowances, strict=True):
                allowed = 2 * e_plain + 2 * eps
                # Written so that NaN fails.
                if not e <= allowed:
                    return Verdict(False, e, allowed, f"output {number}: error of the {what} is {e:.3g}; at most {allowed:.3g} is allowed")
                if e / allowed >= worst.error / worst.allowed:
                    worst = Verdict(True, e, allowed)
    return worst


def hold_stream(device: str) -> None:
    """Keep the current stream busy for some 20 ms, so that the numbers copied next arrive late: a runner that works on
    another stream without waiting for them reads old ones, and is judged by what it makes of these."""
    if device == "cuda":
        torch.cuda._sleep(HOLD_CYCLES)


def errors(y: Tensor, truth: Tensor, planes: bool) -> tuple[float, float]:
    """The error of the whole tensor and, with `planes`, of its worst plane (else the first again)."""
    if truth.numel() == 0:
        return 0.0, 0.0
    difference = (y.double() - truth).abs()
    if not torch.isfinite(difference).all():
        return math.inf, math.inf
    scale = truth.abs().amax().item() or 1.0
    whole = difference.amax().item() / scale
    if not planes:
        return whole, whole
    # A plane of values near zero alone would measure cancellation, in which eager may be luckier.
    return whole, (difference.amax((2, 3)) / truth.abs().amax((2, 3)).clamp_min(scale / 16)).amax().item()


def _outputs(build: Builder, case: Case, seed: int, dtype: torch.dtype, channels_last: bool = False) -> tuple[Tensor, ...]:
    answer = build(draw_state(case, dtype))(*draw_inputs(case, seed, dtype, channels_last))
    return answer if isinstance(answer, tuple) else (answer,)


def _dtype(case: Case) -> torch.dtype:
    dtype = getattr(torch, case.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
