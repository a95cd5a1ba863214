"""Channel attention and skip as RCAN has it (64 channels squeezed by 16), at the sizes of inference and of training.

Forward also runs into a buffer that is given, as networks have it: a fresh large output costs more page faults than arithmetic
(`--pages` shows how much). Forward and backward give the gradients of x and of the four parameters, without the skip.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr import ops
from fastsr.bench.case import Builder, Call, Case, Inputs, Runner, State, element_size, laid_out, with_gradients
from fastsr.bench.cases.peers.rivals import plain_runners
from fastsr.bench.suite import Options

CHANNELS, SQUEEZED = 64, 4
IMAGES = {
    "tiny": ((2, 5, 19),),
    "quick": ((16, 48, 48),),
    "full": ((16, 48, 48), (32, 64, 64), (1, 128, 128), (4, 256, 256), (1, 512, 512), (1, 540, 960)),
}


def eager_channel_attention(
    x: Tensor, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor, residual: Tensor | None = None
) -> Tensor:
    """As networks write it: pooling, two 1x1 convolutions, ReLU, sigmoid, product and sum."""
    z = F.relu(F.conv2d(F.adaptive_avg_pool2d(x, 1), down_weight, down_bias))
    y = x * torch.sigmoid(F.conv2d(z, up_weight, up_bias))
    return y if residual is None else y + residual


def cases(options: Options) -> list[Case]:
    """Forward, and forward and backward, at every size."""
    return [
        _case(options, dtype, image, backward) for dtype in options.dtypes for image in IMAGES[options.sizes] for backward in (False, True)
    ]


def _case(options: Options, dtype: str, image: tuple[int, int, int], backward: bool) -> Case:
    n, h, w = image

    def state(generator: torch.Generator) -> State:
        return {
            "down_weight": torch.randn(SQUEEZED, CHANNELS, 1, 1, generator=generator) / CHANNELS**0.5,
            "down_bias": 0.3 * torch.randn(SQUEEZED, generator=generator),
            "up_weight": torch.randn(CHANNELS, SQUEEZED, 1, 1, generator=generator) / SQUEEZED**0.5,
            "up_bias": 0.3 * torch.randn(CHANNELS, generator=generator),
        }

    def inputs(generator: torch.Generator) -> Inputs:
        # x has a mean, as activations have; the second is the residual, or the gradient.
        return tuple(torch.randn(n, CHANNELS, h, w, generator=generator) + mean for mean in (0.25, 0.0))

    def ours(backend: str) -> Runner:
        return Runner(_finish(_builder(functools.partial(ops.channel_attention, backend=backend)), backward))

    runners = {name: ours(name) for name in ("auto", "compiled", "triton", "reference")}
    runners["auto, NCHW"] = Runner(runners["auto"].build, channels_last=False)
    if not backward:
        runners["auto, given buffer"] = Runner(laid_out(_into_a_buffer))
    runners |= plain_runners(
        lambda wrap: _finish(_builder(wrap(eager_channel_attention)), backward), dtype, options, inference=not backward
    )
    values = n * CHANNELS * h * w
    parameters = (2 * SQUEEZED + 1) * CHANNELS + SQUEEZED
    direction = "forward+backward" if backward else "forward"
    return Case(
        suite="ops",
        subject="channel_attention",
        label=f"{n}x{CHANNELS}x{h}x{w} {direction}",
        device=options.device,
        dtype=dtype,
        sizes={"n": n, "c": CHANNELS, "h": h, "w": w, "squeezed": SQUEEZED, "direction": direction},
        flops=float(values * (8 if backward else 3)),
        bytes=float((values * (4 if backward else 3) + parameters * (1 + backward)) * element_size(dtype)),
        state=state,
        inputs=inputs,
        eager=_finish(_builder(eager_channel_attention), backward),
        runners=runners,
    )


def _finish(build: Builder, backward: bool) -> Builder:
    return laid_out(with_gradients(build, count=4) if backward else build)


def _builder(call: Callable[..., Tensor]) -> Builder:
    def build(state: State) -> Call:
        parameters = tuple(state.values())

        def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return call(x, *parameters, residual=residual)

        return run

    return build


def _into_a_buffer(state: State) -> Call:
    buffers: dict[Any, Tensor] = {}

    def run(x: Tensor, residual: Tensor) -> Tensor:
        if x.shape not in buffers:
            buffers[x.shape] = torch.zeros_like(x)
        return ops.channel_attention(x, *state.values(), residual, out=buffers[x.shape])

    return run
