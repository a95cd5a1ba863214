"""RRDBNet x4: the network of Real-ESRGAN with its 23 blocks on one image, forward; on a picture of 960x540 with the 6 blocks of the
anime network; and a training step on batches of patches with 3 blocks, which are alike (the whole would take minutes for the answer
in float64 alone).

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
from fastsr.models import RRDBNet

#: (blocks, (batch, height, width))
FORWARD = {
    "full": ((23, (1, 128, 128)), (23, (1, 256, 256)), (6, (1, 540, 960))),
    "quick": ((6, (1, 32, 32)),),
    "tiny": ((23, (1, 8, 8)),),
}
TRAINING = {"full": ((3, (16, 48, 48)), (3, (32, 64, 64))), "quick": ((1, (4, 16, 16)),), "tiny": ((1, (1, 8, 8)),)}
CROP = 64


def cases(options: Options) -> list[Case]:
    """For each dtype forward and a training step at each size."""
    made = []
    for dtype in options.dtypes:
        made += [_case(options, dtype, image, blocks, backward=False) for blocks, image in FORWARD[options.sizes]]
        made += [_case(options, dtype, image, blocks, backward=True) for blocks, image in TRAINING[options.sizes]]
    return made


def _case(options: Options, dtype: str, image: tuple[int, int, int], blocks: int, backward: bool) -> Case:
    n, h, w = image

    def inputs(generator: torch.Generator) -> Inputs:
        x = torch.rand(n, 3, h, w, generator=generator)
        return (x, torch.randn(n, 3, 4 * h, 4 * w, generator=generator)) if backward else (x,)

    plain = functools.partial(eager.RRDBNet, num_block=blocks)
    ours = functools.partial(RRDBNet, 3, 3, num_block=blocks)
    lean = functools.partial(ours, save="input") if backward else None
    finish = builders.training_step(("conv_first.weight", "conv_hr.weight")) if backward else None
    with torch.device("meta"):
        network = plain()
    direction = "training step" if backward else "forward"
    depth = "" if blocks == 23 else f"{blocks} blocks "
    flops = n * eager.conv_flops(network, h, w) * (3 if backward else 1)
    element = torch.finfo(DTYPES[dtype]).bits // 8
    return Case(
        suite="models",
        subject="rrdbnet",
        label=f"x4 {n}x3x{h}x{w} {depth}{direction}",
        device=options.device,
        dtype=dtype,
        sizes={"n": n, "h": h, "w": w, "num_feat": 64, "num_block": blocks, "num_grow_ch": 32, "direction": direction},
        flops=flops,
        bytes=float(element * (1 + backward) * (3 * n * h * w * 17 + sum(p.numel() for p in network.parameters()))),
        state=builders.state_like(plain, 1),  # 23 blocks' outputs stay near 1
        inputs=inputs,
        eager=builders.eager(plain, finish),
        runners=builders.runners(plain, ours, dtype, options, finish, lean),
        crop=None if backward else corner(CROP, flops),
    )
