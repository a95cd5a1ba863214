"""RRDBNet x4 with 23 blocks, one image, forward: the network of Real-ESRGAN.

All runners have the same weights; the answer of each is compared with the eager network in float64.
"""

from __future__ import annotations

import torch

from fastsr.bench.case import DTYPES, Case, Inputs
from fastsr.bench.cases.models import builders
from fastsr.bench.cases.peers import eager
from fastsr.bench.suite import Options
from fastsr.models import RRDBNet

SIZES = {"full": (128, 256), "quick": (32,), "tiny": (8,)}


def cases(options: Options) -> list[Case]:
    """One case for each size and dtype."""
    return [_case(options, dtype, size) for dtype in options.dtypes for size in SIZES[options.sizes]]


def _case(options: Options, dtype: str, size: int) -> Case:
    def inputs(generator: torch.Generator) -> Inputs:
        return (torch.rand(1, 3, size, size, generator=generator),)

    with torch.device("meta"):
        network = eager.RRDBNet()
    element = torch.finfo(DTYPES[dtype]).bits // 8
    return Case(
        suite="models",
        subject="rrdbnet",
        label=f"x4 1x3x{size}x{size} forward",
        device=options.device,
        dtype=dtype,
        sizes={"n": 1, "h": size, "w": size, "num_feat": 64, "num_block": 23, "num_grow_ch": 32, "direction": "forward"},
        flops=eager.conv_flops(network, size, size),
        bytes=float(element * (3 * size * size * 17 + sum(p.numel() for p in network.parameters()))),
        state=builders.state_like(eager.RRDBNet, 1),  # 23 blocks' outputs stay near 1
        inputs=inputs,
        eager=builders.eager(eager.RRDBNet),
        runners=builders.runners(eager.RRDBNet, lambda: RRDBNet(3, 3), dtype, options),
    )
