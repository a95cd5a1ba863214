"""What one training step holds in activations: `measure` runs it, `simulate` predicts it from shapes alone.

    saved   bytes that autograd holds when forward has ended: distinct storages, parameters and copies of them left out
    peak    the most activation bytes alive at once during forward and backward: what is saved, intermediate results, the
            gradients of activations, the output and its gradient; not the input, nor the parameters and their gradients
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fastsr.memory.tracker import Tracker
from fastsr.nn.freezing import unfreeze

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class Memory:
    """Activation bytes of one training step, and its floating-point operations (0 where they were not counted)."""

    saved: int
    peak: int
    flops: int


def measure(model: nn.Module, x: Tensor) -> Memory:
    """Run forward and backward of `model` on `x` and count the activation bytes.

    On a CPU every storage's life is tracked, from the operator that makes it to the moment when its last tensor goes. On a GPU the
    peak is the allocator's, `torch.cuda.max_memory_allocated` above what was allocated before, and operations are not counted.
    Gradients of parameters that were there stay as they are.

    Raises:
        ValueError: neither `x` nor any parameter asks for a gradient.
    """
    with _gradients_put_aside(model):
        if x.device.type != "cuda":
            return track(model, x)
        backward(forward(model, x))  # makes the parameters' gradients, whose bytes are not to count, and cuDNN's workspace
        torch.cuda.synchronize(x.device)
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        outputs = forward(model, x)
        saved = torch.cuda.memory_allocated(x.device) - before
        backward(outputs)
        torch.cuda.synchronize(x.device)
        return Memory(saved, torch.cuda.max_memory_allocated(x.device) - before, 0)


def simulate(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype) -> Memory:
    """What `measure` would say of `model` in `dtype` on an input of this shape, without computing or allocating anything."""
    with fake_model(model, input_shape, dtype) as (fake, x):
        return track(fake, x)


@contextlib.contextmanager
def fake_model(model: AnyModule, input_shape: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[AnyModule, Tensor]]:
    """A copy of `model` whose parameters and buffers have shapes and no values, and an input for it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    device = torch.device("cpu")
    with mode:
        for t in [*model.parameters(), *model.buffers()]:
            if id(t) not in memo:
                device = t.device
                kind = dtype if t.is_floating_point() else t.dtype
                fake = torch.empty_strided(t.shape, t.stride(), dtype=kind, device=t.device)
                memo[id(t)] = nn.Parameter(fake, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else fake
    fake_copy = unfreeze(copy.deepcopy(model, memo))
    with mode, torch.enable_grad():
        yield fake_copy, torch.empty(tuple(input_shape), dtype=dtype, device=device)


def track(model: nn.Module, x: Tensor) -> Memory:
    """One step on real or fake tensors under a tracker."""
    with Tracker([*model.parameters(), *model.buffers()]) as tracker:
        with tracker.watch_saved():
            outputs = forward(model, x)
        saved = tracker.held([x, *outputs])
        backward(outputs)
        tracker.leave_out(p.grad for p in model.parameters() if p.grad is not None)
    return Memory(tracker.bytes(saved), max(tracker.peaks().values(), default=0), sum(tracker.flops.values()))


def forward(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of `model` that can be differentiated."""
    outputs = [t for t in tree_leaves(model(x)) if isinstance(t, Tensor) and t.requires_grad]
    if not outputs:
        raise ValueError(f"{type(model).__name__}: no output asks for a gradient; expected a model with parameters to train")
    return outputs


def backward(outputs: list[Tensor]) -> None:
    """Run backward from a gradient of ones; the outputs stay alive, as a loss would keep them."""
    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


@contextlib.contextmanager
def _gradients_put_aside(model: nn.Module) -> Iterator[None]:
    before = [(p, p.grad) for p in model.parameters()]
    for p, _ in before:
        p.grad = None
    gc.collect()
    try:
        yield
    finally:
        for p, grad in before:
            p.grad = grad
