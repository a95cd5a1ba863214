"""What a benchmark case is: one computation at one size, its inputs, its work and everyone who can do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

#: The tensors that stay the same from call to call (weights), and those that are new in every call.
State = dict[str, Tensor]
Inputs = tuple[Tensor, ...]

#: The timed call: inputs -> outputs, all of which the correctness gate looks at (gradients too).
Call = Callable[..., "Tensor | tuple[Tensor, ...]"]

#: Makes the timed call from the weights; runs once, in the runner's own process, and is not timed.
Builder = Callable[[State], Call]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Operations of which float64 on two cores takes seconds, not minutes: beyond, a forward case names a `crop`.
AFFORDABLE_FLOPS = 2e11

#: The eager runner that ratios are taken against: what a careful user has without this package.
BASELINE = "eager channels-last"


class Unavailable(RuntimeError):
    """Raised by a builder whose runner cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Runner:
    """One way to do a case's computation."""

    build: Builder
    channels_last: bool = True  # the layout in which it gets its (N, C, H, W) inputs
    dtype: str | None = None  # that of its inputs, where it is not the case's; their values are the case's all the same


@dataclass(frozen=True)
class Case:
    """One computation at one size.

    `inputs` draws a fresh set from a generator; `state` draws the weights, which are equal in all processes.
    `eager` is the plain computation: in float64 it is the truth, in the case's dtype it sets the error allowed.
    `flops` counts a multiply-add as two, as a direct convolution has them; `bytes` counts each input read once
    and each output written once. `crop` is for a forward case whose float64 would take minutes: it cuts the inputs to a size
    that the same call can take (see `fastsr.bench.gate`). `margin` says where a whole-number output, of the inputs and the state in
    float64, is clear: elsewhere two values are so near each other that either is right.
    """

    suite: Literal["ops", "models", "scaling"]
    subject: str  # the op's or network's name
    label: str  # what sets this case apart among its subject's cases
    device: str
    dtype: str
    sizes: Mapping[str, Any]
    flops: float
    bytes: float
    state: Callable[[torch.Generator], State]
    inputs: Callable[[torch.Generator], Inputs]
    eager: Builder
    runners: Mapping[str, Runner] = field(default_factory=dict)
    crop: Callable[[Inputs], Inputs] | None = None
    margin: Callable[[Inputs, State], Tensor] | None = None
    threads: int | None = None  # CPU threads, where the case is about their number

    @property
    def name(self) -> str:
        """Unique among the cases of a module."""
        return f"{self.subject} {self.label} {self.dtype}"


def with_gradients(build: Builder, count: int) -> Builder:
    """Forward and backward as one call: of the inputs (x, grad), `count` further parameters come from the state.

    The call returns the output, the gradient of x and those of the first `count` tensors of the state.
    """

    def build_both(state: State) -> Call:
        parameters = {name: tensor.detach().clone().requires_grad_(i < count) for i, (name, tensor) in enumerate(state.items())}
        wanted = list(parameters.values())[:count]
        forward = build(parameters)

        def call(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            leaf = x.detach().requires_grad_()
            y = forward(leaf)
            assert isinstance(y, Tensor)
            return (y.detach(), *torch.autograd.grad(y, [leaf, *wanted], grad))

        return call

    return build_both


def corner(side: int, flops: float) -> Callable[[Inputs], Inputs] | None:
    """The crop of a forward case on images: their upper left corner of so many pixels a side; None where float64 is affordable."""
    return None if flops <= AFFORDABLE_FLOPS else lambda inputs: tuple(t[..., :side, :side] for t in inputs)


def to_layout(tensors: Inputs, channels_last: bool) -> Inputs:
    """Each 4-D tensor in the layout, others as they are."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return tuple(t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in tensors)
