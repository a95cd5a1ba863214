"""RCAN x4: the whole network of 400 layers in its blocks on one image, forward; and a training step on 16 patches with one of
its ten groups, which are alike (the whole would take a minute for the answer in float64 alone).

All runners have the same weights; the answer of each is compared with the eager network in float64, as `fastsr.bench.gate` says. A
training step is forward, loss, backward and Adam; it is judged by the output and the gradients of the first and of the last but one
convolution.
"""

from __future__ import annotations

import functools

import torch

from fastsr.bench.case import DTYPES, Case, Inputs, corner
from fastsr.bench.cases.models import builders
from fastsr.bench.cases.peers import eager
from fastsr.bench.suite import Options
from fastsr.models import RCAN

#: (batch, height, width)
FORWARD = {"full": ((1, 128, 128), (1, 256, 256)), "quick": ((1, 32, 32),), "tiny": ((1, 8, 8),)}
TRAINING = {"full": ((16, 48, 48), (32, 64, 64)), "quick": ((4, 24, 24),), "tiny": ((1, 8, 8),)}
CROP = 64
GROUPS, TRAINED_GROUPS = {"full": 10, "quick": 2, "tiny": 10}, 1  # ten take torch.compile a minute


def cases(options: Options) -> list[Case]:
    """For each dtype forward at each size, and a training step."""
    made = []
    for dtype in options.dtypes:
        made += [case(options, dtype, image, GROUPS[options.sizes], backward=False) for image in FORWARD[options.sizes]]
        made += [case(options, dtype, image, TRAINED_GROUPS, backward=True) for image in TRAINING[options.sizes]]
    return made


def case(options: Options, dtype: str, image: tuple[int, int, int], groups: int, backward: bool, blocks: int = 20) -> Case:
    """The network with so many groups of so many blocks, forward or as a training step."""
    n, h, w = image

    def inputs(generator: torch.Generator) -> Inputs:
        x = torch.rand(n, 3, h, w, generator=generator)
        return (x, torch.randn(n, 3, 4 * h, 4 * w, generator=generator)) if backward else (x,)

    plain = functools.partial(eager.RCAN, num_group=groups, num_block=blocks)
    # The plain network has neither a range nor a mean.
    ours = functools.partial(RCAN, 3, 3, num_group=groups, num_block=blocks, img_range=1.0, rgb_mean=(0.0,))
    lean = functools.partial(ours, save="input") if backward else None
    finish = builders.training_step(("conv_first.weight", "upsample.2.weight")) if backward else None
    with torch.device("meta"):
        network = plain()
    direction = "training step" if backward else "forward"
    flops = n * eager.conv_flops(network, h, w) * (3 if backward else 1)
    element = torch.finfo(DTYPES[dtype]).bits // 8
    return Case(
        suite="models",
        subject="rcan",
        label=f"x4 {n}x3x{h}x{w} {groups} groups {f'of {blocks} blocks ' if blocks != 20 else ''}{direction}",
        device=options.device,
        dtype=dtype,
        sizes={
            "n": n,
            "h": h,
            "w": w,
            "num_feat": 64,
            "num_group": groups,
            "num_block": blocks,
            "squeeze_factor": 16,
            "direction": direction,
        },
        flops=flops,
        bytes=float(element * (1 + backward) * (3 * n * h * w * 17 + sum(p.numel() for p in network.parameters()))),
        state=builders.state_like(plain, 1 / 3),  # that of torch's initialisation
        inputs=inputs,
        eager=builders.eager(plain, finish),
        runners=builders.runners(plain, ours, dtype, options, finish, lean),
        crop=None if backward else corner(CROP, flops),
    )
