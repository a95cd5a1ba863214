"""The residual dense block of ESRGAN (64 features, growth 32), at the sizes of inference and of training.

Forward alone also runs in buffers that are given, as a network passes them along; forward and backward give all gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastsr import ops
from fastsr.bench.case import Builder, Call, Case, Inputs, Runner, State, corner, element_size, laid_out, with_gradients
from fastsr.bench.cases.peers.rivals import plain_runners
from fastsr.bench.suite import Options
from fastsr.kernels.dense_block.reference import dense_block as eager_dense_block

FEATURES, GROWTH, CONVS = 64, 32, 5
IMAGES = {
    "tiny": ((2, 5, 19),),
    "quick": ((16, 48, 48),),
    "full": ((16, 48, 48), (32, 64, 64), (1, 128, 128), (1, 256, 256), (1, 540, 960)),
}


def cases(options: Options) -> list[Case]:
    """Forward at every size; forward and backward, with the workspace kept and with x alone, at those of training patches."""
    made = []
    for dtype in options.dtypes:
        for image in IMAGES[options.sizes]:
            made.append(case(options, dtype, image, backward=False))
            if image[1] <= 128:
                made.append(case(options, dtype, image, backward=True))
    return made


def case(options: Options, dtype: str, image: tuple[int, int, int], backward: bool) -> Case:
    """One block on (batch, height, width), forward or with all gradients."""
    n, h, w = image
    shapes = [(FEATURES if k == CONVS - 1 else GROWTH, FEATURES + k * GROWTH, 3, 3) for k in range(CONVS)]

    def state(generator: torch.Generator) -> State:
        drawn = {f"weight{k}": torch.randn(s, generator=generator) / (9 * s[1]) ** 0.5 for k, s in enumerate(shapes)}
        return {**drawn, **{f"bias{k}": 0.3 * torch.randn(s[0], generator=generator) for k, s in enumerate(shapes)}}

    def inputs(generator: torch.Generator) -> Inputs:
        return tuple(torch.randn(n, FEATURES, h, w, generator=generator) for _ in range(1 + backward))

    def ours(backend: str, **more: Any) -> Runner:
        return Runner(_finish(_builder(functools.partial(ops.dense_block, backend=backend, **more)), backward))

    runners = {name: ours(name) for name in ("auto", "compiled", "triton", "reference")}
    if backward:
        runners["auto, save=input"] = ours("auto", save="input")
    else:
        runners["auto, given buffers"] = Runner(laid_out(_in_buffers))
    runners |= plain_runners(lambda wrap: _finish(_builder(wrap(eager_dense_block)), backward), dtype, options, inference=not backward)
    weights = sum(torch.Size(s).numel() for s in shapes)
    values = (2 * n * h * w * FEATURES + weights + sum(s[0] for s in shapes)) * (1 + backward)
    direction = "forward+backward" if backward else "forward"
    flops = 2.0 * weights * n * h * w * (3 if backward else 1)
    return Case(
        suite="ops",
        subject="dense_block",
        label=f"{n}x{FEATURES}x{h}x{w} {direction}",
        device=options.device,
        dtype=dtype,
        sizes={"n": n, "h": h, "w": w, "num_feat": FEATURES, "num_grow_ch": GROWTH, "direction": direction},
        flops=flops,
        bytes=float(values * element_size(dtype)),
        state=state,
        inputs=inputs,
        eager=_finish(_builder(eager_dense_block), backward),
        runners=runners,
        crop=None if backward else corner(128, flops),
    )


def _finish(build: Builder, backward: bool) -> Builder:
    return laid_out(with_gradients(build, count=2 * CONVS) if backward else build)


def _parameters(state: State) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [state[f"weight{k}"] for k in range(CONVS)], [state[f"bias{k}"] for k in range(CONVS)]


def _builder(call: Callable[..., torch.Tensor]) -> Builder:
    def build(state: State) -> Call:
        weights, biases = _parameters(state)
        return lambda x: call(x, weights, biases)

    return build


def _in_buffers(state: State) -> Call:
    """Workspace and output are given, and x is copied into the workspace, as the block before it would have left it."""
    weights, biases = _parameters(state)
    buffers: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(x: torch.Tensor) -> torch.Tensor:
        if x.shape not in buffers:
            n, _, h, w = x.shape
            workspace = x.new_empty((n, FEATURES + (CONVS - 1) * GROWTH, h, w)).contiguous(memory_format=torch.channels_last)
            buffers[x.shape] = workspace, torch.empty_like(x)
        workspace, out = buffers[x.shape]
        return ops.dense_block(x, weights, biases, workspace=workspace, out=out)

    return run
