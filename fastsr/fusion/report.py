"""What `fuse_` found and did, as data and as a table; what it is predicted to give, and what it gives."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastsr.fusion.swap import FusedForward
from fastsr.memory import Memory, measure
from fastsr.memory.sizes import format_bytes


@dataclass(frozen=True)
class Cost:
    """What a block costs for each pixel of its input, in bytes, and in operators.

    Attributes:
        saved: bytes kept for backward.
        moved, stepped: bytes read or written by operators in forward, and in forward and backward.
        calls: operators that a forward calls.
    """

    saved: float
    moved: float
    stepped: float
    calls: int


@dataclass(frozen=True)
class Row:
    """One block that was fused, or looked like one that could be.

    Attributes:
        name: of the module; "" is the model itself.
        kind: of the block, as its family calls it.
        fused: whether its forward was swapped.
        reason: why not, or why it runs fused in training alone; "" where it always does.
        before, after: predicted costs, with its own code and fused; None where it is no such block, or where they cannot be predicted.
    """

    name: str
    kind: str
    fused: bool
    reason: str = ""
    before: Cost | None = None
    after: Cost | None = None


@dataclass(frozen=True)
class Measurement:
    """The whole model on one example, with its own code and fused.

    Attributes:
        seconds: (before, after), medians of a forward without gradients, or of a training step.
        memory: (before, after) of a training step; None where nothing is to be trained.
        difference: the largest absolute difference of the outputs, and `scale` the largest absolute output.
    """

    input_shape: tuple[int, ...]
    training: bool
    seconds: tuple[float, float]
    memory: tuple[Memory, Memory] | None
    difference: float
    scale: float

    def __str__(self) -> str:
        before, after = self.seconds
        what = "a training step" if self.training else "a forward"
        lines = [f"{what} on {self.input_shape}: {before * 1e3:.1f} -> {after * 1e3:.1f} ms ({before / after:.2f} times as fast)"]
        if self.memory is not None:
            old, new = self.memory
            saved, peak = ((format_bytes(a), format_bytes(b)) for a, b in ((old.saved, new.saved), (old.peak, new.peak)))
            lines.append(f"saved for backward {saved[0]} -> {saved[1]}, peak {peak[0]} -> {peak[1]}")
        lines.append(f"largest difference of the outputs {self.difference:.1e}, of {self.scale:.1e}")
        return "\n".join(lines)


@dataclass
class Report:
    """What `fuse_` found in a model, block by block. Prints as a table, in which blocks that are alike share a line."""

    model: nn.Module = field(repr=False)
    rows: tuple[Row, ...]
    measured: Measurement | None = None

    @property
    def fused(self) -> tuple[str, ...]:
        """The names of the fused blocks."""
        return tuple(row.name for row in self.rows if row.fused)

    def measure(self, example: Tensor, *, training: bool | None = None, repeats: int = 5) -> Measurement:
        """Run the model on `example` with its own code and fused, in turns, and compare time, memory and output.

        Args:
            example: the model's input.
            training: time forward and backward instead of forward alone; None for the model's mode.
            repeats: how often each is timed, after one run that is not.

        Returns:
            The medians; also kept as `measured`. Gradients that parameters have stay as they are. A training step of a model with moving
            averages moves them.
        """
        train = self.model.training if training is None else training
        outputs: list[Tensor] = []
        times: tuple[list[float], list[float]] = ([], [])
        memory: list[Memory] = []
        for turn in range(repeats + 1):
            for fused in (False, True):
                with own_code(self.model, not fused):
                    seconds, y = _timed(self.model, example, train)
                if turn:
                    times[fused].append(seconds)
                else:
                    outputs.append(y)
        if train or any(p.requires_grad for p in self.model.parameters()):
            for fused in (False, True):
                with own_code(self.model, not fused):
                    memory.append(measure(self.model, example.clone().requires_grad_() * 1))
        difference = (outputs[0].double() - outputs[1].double()).abs().max().item()
        self.measured = Measurement(
            tuple(example.shape),
            train,
            (statistics.median(times[0]), statistics.median(times[1])),
            (memory[0], memory[1]) if memory else None,
            difference,
            outputs[0].abs().max().item(),
        )
        return self.measured

    def __str__(self) -> str:
        if not self.rows:
            return f"{type(self.model).__name__}: nothing to fuse; no block looks like one that fastsr's operators compute"
        lines = [["block", "kind", "", "kept a pixel", "moved, forward", "moved, step", "operators"]]
        alike: dict[Any, list[Row]] = {}
        for row in self.rows:
            alike.setdefault(_likeness(row), []).append(row)
        for (where, kind, fused, reason, before, after), rows in alike.items():
            name = f"{where} ({len(rows)})" if len(rows) > 1 else rows[0].name or "the model"
            costs = [""] * 4
            if before is not None and after is not None:
                pairs = ((before.saved, after.saved), (before.moved, after.moved), (before.stepped, after.stepped))
                costs = [*(f"{a:.0f} -> {b:.0f} B" for a, b in pairs), f"{before.calls} -> {after.calls}"]
            lines.append([name, kind, f"fused {reason}".rstrip() if fused else f"left: {reason}", *costs])
        widths = [max(len(line[k]) for line in lines) for k in range(7)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        head = f"{type(self.model).__name__}: {len(self.fused)} of {len(self.rows)} blocks fused"
        return "\n".join([head, *table, *([str(self.measured)] if self.measured else [])])


@contextmanager
def own_code(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Inside the block fused modules run the forward that they had; with `on=False` nothing changes."""
    forwards = [f for m in model.modules() if isinstance(f := m.__dict__.get("forward"), FusedForward) and f.enabled] if on else []
    for forward in forwards:
        forward.enabled = False
    try:
        yield
    finally:
        for forward in forwards:
            forward.enabled = True


def _timed(model: nn.Module, x: Tensor, training: bool) -> tuple[float, Tensor]:
    """Seconds of a forward, or of a step, and the first output."""
    synchronise = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
    gradients, x = [(p, p.grad) for p in model.parameters()], x.clone()  # some networks write into their input
    with torch.set_grad_enabled(training):
        synchronise()
        begin = time.perf_counter()
        outputs = [t for t in tree_leaves(model(x)) if isinstance(t, Tensor) and t.is_floating_point()]
        losses = [t.float().square().mean() for t in outputs if t.requires_grad]
        if training and losses:
            torch.stack(losses).sum().backward()
        synchronise()
        seconds = time.perf_counter() - begin
    for p, grad in gradients:
        p.grad = grad
    return seconds, outputs[0].detach()


def _likeness(row: Row) -> tuple[str, str, bool, str, Cost | None, Cost | None]:
    """Blocks that agree in this share a line."""
    where = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
    return where.rstrip("0123456789"), row.kind, row.fused, row.reason, row.before, row.after
