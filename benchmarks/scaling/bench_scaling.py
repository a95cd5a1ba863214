"""Curves: how time and memory grow with pixels, depth, batch and threads, and of code search with N, K and D.
`fastsr bench report` plots them.

Every point is a case of another module with one size varied; `sizes` names the axis and the value on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from fastsr.bench.case import BASELINE, Case
from fastsr.bench.cases.models import bench_rcan
from fastsr.bench.cases.ops import bench_dense_block, bench_vector_quantize, bench_vq_nearest
from fastsr.bench.cases.ops.bench_vq_nearest import Size
from fastsr.bench.cases.peers import eager
from fastsr.bench.suite import Options

#: A curve through every rival of every case would take days.
RUNNERS = ("auto", "auto, save=input", BASELINE, "torch.compile", "faiss IndexFlatL2", "flash-kmeans")

SIDES = {"full": (16, 32, 64, 128, 256, 512), "quick": (16, 48), "tiny": (4, 6)}
#: (groups, blocks in each): 10 to 825 convolutions of 3x3.
DEPTHS = {"full": ((1, 2), (1, 5), (1, 10), (1, 20), (2, 20), (5, 20), (10, 20), (20, 20)), "quick": ((1, 2), (1, 20)), "tiny": ((1, 2),)}
BATCHES = {"full": (1, 2, 4, 8, 16, 32), "quick": (1, 4), "tiny": (1, 2)}
PATCH = {"full": 48, "quick": 24, "tiny": 4}
DEEP_PATCH = {"full": 24, "quick": 12, "tiny": 4}
THREAD_IMAGE = {"full": (1, 128, 128), "quick": (1, 48, 48), "tiny": (1, 6, 6)}

#: The size from which one of N, K and D is varied, and the values of each.
CODES = {"full": Size(16384, 1024, 64), "quick": Size(1024, 128, 32), "tiny": Size(40, 33, 5)}
ROWS = {"full": (256, 1024, 4096, 16384, 65536, 262144), "quick": (256, 1024), "tiny": (8, 40)}
CODEBOOK = {"full": (64, 256, 1024, 4096, 16384), "quick": (32, 128), "tiny": (4, 33)}
CHANNELS = {"full": (4, 8, 16, 32, 64, 128, 256, 512), "quick": (8, 32), "tiny": (2, 5)}


def cases(options: Options) -> list[Case]:
    """All curves for each dtype."""
    return [case for dtype in options.dtypes for case in _curves(options, dtype)]


def _curves(options: Options, dtype: str) -> Iterator[Case]:
    size = options.sizes
    for side in SIDES[size]:
        yield _point(bench_rcan.case(options, dtype, (1, side, side), 1, backward=False), "pixels", side * side)
    for groups, blocks in DEPTHS[size]:
        image = (1, DEEP_PATCH[size], DEEP_PATCH[size])
        yield _point(bench_rcan.case(options, dtype, image, groups, backward=True, blocks=blocks), "depth", _convolutions(groups, blocks))
    for batch in BATCHES[size]:
        yield _point(bench_rcan.case(options, dtype, (batch, PATCH[size], PATCH[size]), 1, backward=False), "batch", batch)
    for axis, field, values in (("rows", "n", ROWS), ("k", "k", CODEBOOK), ("d", "d", CHANNELS)):
        for value in values[size]:
            codes = replace(CODES[size], **{field: value})
            yield _point(bench_vq_nearest.case(options, dtype, codes), axis, value)
            yield _point(bench_vector_quantize.case(options, dtype, codes), axis, value)
    if options.device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        for threads in sorted({*(2**k for k in range(cores.bit_length())), cores}):
            case = bench_dense_block.case(options, dtype, THREAD_IMAGE[size], backward=False)
            yield replace(_point(case, "threads", threads), threads=threads)


def _point(case: Case, axis: str, value: int) -> Case:
    """The case as a point of a curve."""
    return replace(
        case,
        suite="scaling",
        label=f"{axis} {value}: {case.label}",
        sizes={**case.sizes, "axis": axis, axis: value},
        runners={name: case.runners[name] for name in RUNNERS if name in case.runners},
    )


def _convolutions(groups: int, blocks: int) -> int:
    with torch.device("meta"):
        network = eager.RCAN(num_group=groups, num_block=blocks)
    return sum(isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) for m in network.modules())
