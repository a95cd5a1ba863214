"""RCAN's residual channel attention block (64 channels squeezed by 16), at the sizes of training and of inference.

Forward alone also runs in buffers that are given and with frozen weights, as a network does it; forward and backward give all gradients,
also with x alone kept, the rest recomputed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsr import ops
from fastsr.bench.case import Builder, Call, Case, Inputs, Runner, State, element_size, laid_out, with_gradients
from fastsr.bench.cases.peers.rivals import plain_runners
from fastsr.bench.suite import Options
from fastsr.kernels.rcab.reference import rcab as eager_rcab

FEATURES, SQUEEZED = 64, 4
IMAGES = {
    "tiny": ((2, 5, 19),),
    "quick": ((16, 48, 48),),
    "full": ((16, 48, 48), (32, 64, 64), (1, 128, 128), (1, 256, 256), (1, 540, 960)),
}
SHAPES = {
    "weight1": (FEATURES, FEATURES, 3, 3),
    "weight2": (FEATURES, FEATURES, 3, 3),
    "down_weight": (SQUEEZED, FEATURES),
    "up_weight": (FEATURES, SQUEEZED),
}


def cases(options: Options) -> list[Case]:
    """Forward, and forward and backward, at every size; of a whole picture forward alone."""
    return [
        case(options, dtype, image, backward)
        for dtype in options.dtypes
        for image in IMAGES[options.sizes]
        for backward in (False, True)
        if not backward or image[1] <= 256
    ]


def case(options: Options, dtype: str, image: tuple[int, int, int], backward: bool) -> Case:
    """One block on (batch, height, width), forward or with all gradients."""
    n, h, w = image

    def state(generator: torch.Generator) -> State:
        drawn = {}
        for name, shape in SHAPES.items():
            drawn[name] = torch.randn(shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5
            drawn[name.replace("weight", "bias")] = 0.3 * torch.randn(shape[0], generator=generator)
        return drawn

    def inputs(generator: torch.Generator) -> Inputs:
        return tuple(torch.randn(n, FEATURES, h, w, generator=generator) for _ in range(1 + backward))

    def ours(backend: str, **more: Any) -> Runner:
        return Runner(_finish(_builder(functools.partial(ops.rcab, backend=backend, **more)), backward))

    runners = {name: ours(name) for name in ("auto", "compiled", "triton", "reference")}
    if backward:
        runners["auto, save=input"] = ours("auto", save="input")
    else:
        runners["auto, given buffers"] = Runner(laid_out(_in_buffers))
    runners |= plain_runners(lambda wrap: _finish(_builder(wrap(eager_rcab)), backward), dtype, options, inference=not backward)
    parameters = sum(torch.Size(shape).numel() + shape[0] for shape in SHAPES.values())
    values = (2 * n * h * w * FEATURES + parameters) * (1 + backward)
    flops = 2.0 * 18 * FEATURES * FEATURES * n * h * w * (3 if backward else 1)
    direction = "forward+backward" if backward else "forward"
    return Case(
        suite="ops",
        subject="rcab",
        label=f"{n}x{FEATURES}x{h}x{w} {direction}",
        device=options.device,
        dtype=dtype,
        sizes={"n": n, "h": h, "w": w, "num_feat": FEATURES, "squeezed": SQUEEZED, "direction": direction},
        flops=flops,
        bytes=float(values * element_size(dtype)),
        state=state,
        inputs=inputs,
        eager=_finish(_builder(eager_rcab), backward),
        runners=runners,
    )


def _finish(build: Builder, backward: bool) -> Builder:
    return laid_out(with_gradients(build, count=2 * len(SHAPES)) if backward else build)


def _builder(call: Callable[..., Tensor]) -> Builder:
    def build(state: State) -> Call:
        parameters = tuple(state.values())
        return lambda x: call(x, *parameters)

    return build


def _in_buffers(state: State) -> Call:
    """Hidden channels and output are given, weights are packed once: a network after `fastsr.freeze`."""
    parameters = tuple(state.values())
    packed = ops.pack_weights(parameters[:4:2], parameters[1:4:2])
    buffers: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def run(x: Tensor) -> Tensor:
        if x.shape not in buffers:
            buffers[x.shape] = torch.empty_like(x), torch.empty_like(x)
        workspace, out = buffers[x.shape]
        return ops.rcab(x, *parameters, workspace=workspace, out=out, packed=packed)

    return run
