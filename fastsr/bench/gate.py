"""The correctness gate: a runner whose answer is worse than plain PyTorch's is reported, and never timed.

For every output y of a call, with y64 from the eager computation in float64 on the same numbers:

    1. e(y)    = max |y - y64| / max |y64|, over the tensor; for images (the first output's shape or the first input's) also
                 the largest such ratio of a plane (image, channel), its max |y64| counting as at least 1/16 of the tensor's
    2. allowed = 2 * e(eager in the same dtype) + 2 * eps(dtype), eager's e being the larger of NCHW and channels-last
    3. the runner passes if e(y) <= allowed, on every set of inputs

Whole numbers (a code's index) must be the float64 answer's wherever the case calls that answer clear (`Case.margin`), else everywhere.

A case with a `crop` is one whose float64 would take minutes. The same call must then pass twice on every set of inputs:

    4. on the crop of the inputs, steps 1 to 3 as they stand
    5. on the whole inputs with eager float32 in place of y64: in a lower precision step 2 as it stands, since float32 is as good as
       exact there; in float32, where eager is no better than what is judged, `allowed` is the crop's
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsr.bench.case import Call, Case, Inputs, Runner, State, to_layout

#: Before the clock two sets, so that a runner which hands out its first answer again is caught.
SEEDS = (9001, 9002)
STATE_SEED = 7
HOLD_CYCLES = 40_000_000


@dataclass(frozen=True)
class Truth:
    """What the answers to one set of inputs, whole or cropped, are compared with."""

    seed: int
    cropped: bool
    outputs: list[Tensor]
    planes: list[bool]  # whether each output is judged by (image, channel) too
    plain: list[tuple[float, float]]  # eager's errors, of each output's tensor and of its worst plane
    clear: Tensor | None = None  # where whole numbers must agree; None for everywhere


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


def draw_for(case: Case, runner: Runner, seed: int) -> Inputs:
    """A fresh set of inputs as the runner takes them: the case's numbers in its dtype and layout."""
    return draw_inputs(case, seed, getattr(torch, runner.dtype or case.dtype), runner.channels_last)


def seed_after(number: int) -> int:
    """The inputs of the judgement after the clock with this number: one that its process has not seen."""
    return SEEDS[-1] + 1 + number


def prepare(case: Case, path: Path, seeds: tuple[int, ...] = SEEDS) -> None:
    """Compute the truth and eager's error for every set of inputs, and keep both in `path` for the runners."""
    low, kept = _dtype(case), []
    for seed in seeds:
        exact = _truth(case, seed, torch.float64, cropped=case.crop is not None)
        kept.append(exact)
        if case.crop is not None:
            plain = exact.plain if low == torch.float32 else None
            kept.append(_truth(case, seed, torch.float32, cropped=False, plain=plain))
    torch.save([asdict(truth) for truth in kept], path)


def _truth(case: Case, seed: int, wide: torch.dtype, cropped: bool, plain: list[tuple[float, float]] | None = None) -> Truth:
    """Eager's answer in `wide`, and its errors in the case's dtype unless they are given."""
    low = _dtype(case)
    # Of a whole case in float32 the truth is eager itself, in the layout that is the baseline's.
    outputs = [y.cpu() for y in _outputs(case, seed, wide, cropped, channels_last=wide == torch.float32)]
    images = {outputs[0].shape, _inputs(case, seed, low, cropped)[0].shape}
    planes = [t.dim() == 4 and t.shape in images for t in outputs]
    if plain is None:
        # Both layouts are plain PyTorch, with different algorithms and errors beneath. Of whole numbers none may be wrong.
        by_layout = [
            [errors(y.cpu(), t, p) for y, t, p in zip(_outputs(case, seed, low, cropped, layout), outputs, planes, strict=True)]
            for layout in (False, True)
        ]
        plain = [(max(a[0], b[0]), max(a[1], b[1])) for a, b in zip(*by_layout, strict=True)]
    clear = None
    if case.margin is not None and any(not t.is_floating_point() for t in outputs):
        clear = case.margin(_inputs(case, seed, torch.float64, cropped), draw_state(case, torch.float64)).cpu()
    return Truth(seed, cropped, outputs, planes, plain, clear)


def judge(
    case: Case, runner: Runner, call: Call, path: Path, seeds: tuple[int, ...] = SEEDS, sets: list[Inputs] | None = None
) -> Verdict:
    """Put the inputs of `seeds` through the runner's `call` and compare. With `sets`, the numbers are copied into those tensors
    first, so that the very storages which were timed are judged again; crops, which are no such storage, are left out."""
    eps = torch.finfo(_dtype(case)).eps
    worst = Verdict(True, 0.0, math.inf)
    truths = [Truth(**kept) for kept in torch.load(path)]
    for truth in truths:
        if truth.seed not in seeds or (sets and truth.cropped):
            continue
        inputs = _inputs(case, truth.seed, getattr(torch, runner.dtype or case.dtype), truth.cropped, runner.channels_last)
        if sets:
            mine = sets[truth.seed % len(sets)]
            hold_stream(case.device)
            for timed, drawn in zip(mine, inputs, strict=True):
                timed.copy_(drawn)
            inputs = mine
        answer = call(*inputs)
        outputs = answer if isinstance(answer, tuple) else (answer,)
        if len(outputs) != len(truth.outputs):
            return Verdict(False, math.inf, 0.0, f"{len(outputs)} outputs; expected {len(truth.outputs)}")
        for number, (y, t, p, allowances) in enumerate(zip(outputs, truth.outputs, truth.planes, truth.plain, strict=True)):
            if y.shape != t.shape:
                return Verdict(False, math.inf, 0.0, f"output {number} has shape {tuple(y.shape)}; expected {tuple(t.shape)}")
            if not t.is_floating_point():
                if wrong := mistakes(y.detach().cpu(), t, truth.clear):
                    reason = f"output {number}: {wrong} of {t.numel()} are wrong; none may be where the answer is clear"
                    return Verdict(False, wrong, 0.0, reason)
                continue
            for what, e, e_plain in zip(("tensor", "worst plane"), errors(y.detach().cpu(), t, p), allowances, strict=True):
                allowed = 2 * e_plain + 2 * eps
                # Written so that NaN fails.
                if not e <= allowed:
                    where = f"output {number}{' of the crop' if truth.cropped else ''}"
                    return Verdict(False, e, allowed, f"{where}: error of the {what} is {e:.3g}; at most {allowed:.3g} is allowed")
                if e / allowed >= worst.error / worst.allowed:
                    worst = Verdict(True, e, allowed)
    return worst if math.isfinite(worst.allowed) else Verdict(True, 0.0, 0.0)


def mistakes(y: Tensor, truth: Tensor, clear: Tensor | None) -> int:
    """How many of the whole numbers differ where they must not; a floating-point answer is no whole number."""
    if y.is_floating_point():
        return truth.numel()
    differs = y.to(truth.dtype) != truth
    return int((differs if clear is None else differs & clear).sum())


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


def _inputs(case: Case, seed: int, dtype: torch.dtype, cropped: bool, channels_last: bool = False) -> Inputs:
    inputs = draw_inputs(case, seed, dtype, channels_last)
    if not cropped:
        return inputs
    assert case.crop is not None
    return to_layout(case.crop(inputs), channels_last)


def _outputs(case: Case, seed: int, dtype: torch.dtype, cropped: bool, channels_last: bool = False) -> tuple[Tensor, ...]:
    answer = case.eager(draw_state(case, dtype))(*_inputs(case, seed, dtype, cropped, channels_last))
    return answer if isinstance(answer, tuple) else (answer,)


def _dtype(case: Case) -> torch.dtype:
    dtype = getattr(torch, case.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
