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

#: Two distances are told apart by whoever computes in float32 if they differ by more than this, relative to the larger.
CLEAR = 1e-5

#: The eager runner that ratios are taken against: what a careful user has without this package.
BASELINE = "eager channels-last"


class Unavailable(RuntimeError):
    """Raised by a builder whose runner cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Runner:
    """One way to do a case's computation."""

    build: Builder
    channels_last: bool = True  # the layout in which it gets its (N, C, H, W) inputs
    dtype: str | None = None  # in which it gets its inputs, their values rounded to the case's dtype first; None: that dtype


@dataclass(frozen=True)
class Case:
    """One computation at one size.

    `inputs` draws a fresh set from a generator; `state` draws the weights, which are equal in all processes.
    `eager` is the plain computation: in float64 it is the truth, in the case's dtype it sets the error allowed.
    `flops` counts a multiply-add as two, as a direct convolution has them.
    `bytes` is what nobody can do without: each input of the whole call (weights and gradients too) read once, each output (gradients
    of weights too) written once, nothing in between; x counts once even where forward and backward both read it. So 100% of a
    copy roof means the same in all cases, and training cannot reach it unless its tensors stay in a cache.
    `crop` is for a forward case whose float64 would take minutes: it cuts the inputs to a size that the same call can take
    (see `fastsr.bench.gate`).
    `margin` is for a case with an integer output, which is a choice: twice eager's error says nothing about it. Given inputs and state in
    float64 it returns booleans in that output's shape: whether the float64 choice is clear, its distance being less than the second
    best's by more than `CLEAR` of the latter. The gate's rule: no element may differ from the float64 choice where it is
    clear; what differs is counted, reported as wrong and never timed.
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


def laid_out(build: Builder) -> Builder:
    """The same call, its 4-D weights in the layout of its first input: torch computes in channels-last if the input or the weight is.

    It goes around `with_gradients`, whose copies of the weights, and so their gradients, keep the layout.
    """

    def build_later(state: State) -> Call:
        built: list[Call] = []

        def call(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            if not built:
                weights = to_layout(tuple(state.values()), is_channels_last(inputs[0]))
                built.append(build(dict(zip(state, weights, strict=True))))
            return built[0](*inputs)

        return call

    return build_later


def is_channels_last(x: Tensor) -> bool:
    """Whether a 4-D tensor lies in channels-last; one that is both, with a single channel or pixel, counts as it."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def element_size(dtype: str) -> int:
    """Bytes of a value."""
    return DTYPES[dtype].itemsize


def corner(side: int, flops: float) -> Callable[[Inputs], Inputs] | None:
    """The crop of a forward case on images: their upper left corner of so many pixels a side; None where float64 is affordable."""
    return None if flops <= AFFORDABLE_FLOPS else lambda inputs: tuple(t[..., :side, :side] for t in inputs)


def to_layout(tensors: Inputs, channels_last: bool) -> Inputs:
    """Each 4-D tensor in the layout, others as they are."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return tuple(t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in tensors)
