"""Nearest-code search: N rows against K codes of D channels.

Rows are codes plus noise of their size, so that every formula finds the same indices and none is left out as wrong; how often
the formulas are wrong on less kind data stands in docs/vector-quantization.md.
"""

from __future__ import annotations

import functools

import torch

from fastsr import ops
from fastsr.bench.case import BASELINE, DTYPES, Builder, Case, Inputs, Runner, State
from fastsr.bench.cases.peers import code_search
from fastsr.bench.gate import STATE_SEED
from fastsr.bench.suite import Options

SIZES = {
    "tiny": ((40, 33, 5),),
    "quick": ((16384, 512, 64),),
    "full": ((16384, 512, 64), (65536, 1024, 64), (16384, 8192, 256)),
}


def cases(options: Options) -> list[Case]:
    """One case for each size and dtype."""
    return [_case(options.device, dtype, size) for dtype in options.dtypes for size in SIZES[options.sizes]]


def draw_codebook(generator: torch.Generator, k: int, d: int) -> torch.Tensor:
    """Standard normal codes."""
    return torch.randn(k, d, generator=generator)


def draw_rows(generator: torch.Generator, n: int, k: int, d: int) -> torch.Tensor:
    """Rows around the codes that every process draws first."""
    codes = draw_codebook(torch.Generator().manual_seed(STATE_SEED), k, d)
    return codes[torch.randint(k, (n,), generator=generator)] + torch.randn(n, d, generator=generator)


def _case(device: str, dtype: str, size: tuple[int, int, int]) -> Case:
    n, k, d = size

    def state(generator: torch.Generator) -> State:
        return {"codebook": draw_codebook(generator, k, d)}

    def inputs(generator: torch.Generator) -> Inputs:
        return (draw_rows(generator, n, k, d),)

    def search(function: object, **more: object) -> Builder:
        return lambda state: functools.partial(function, codebook=state["codebook"], **more)  # type: ignore[call-overload, no-any-return]

    eager = search(code_search.expanded)
    runners = {name: Runner(search(ops.vq_nearest, backend=name)) for name in ("auto", "compiled", "triton")}
    runners |= {
        BASELINE: Runner(eager),
        "torch.cdist": Runner(search(code_search.cdist)),
        "torch.compile": Runner(lambda state: search(torch.compile(code_search.expanded, dynamic=False))(state)),
        "faiss IndexFlatL2": Runner(code_search.faiss_flat),
        "vector-quantize-pytorch": Runner(code_search.vector_quantize_pytorch),
    }
    values = n * d + k * d
    return Case(
        suite="ops",
        subject="vq_nearest",
        label=f"{n}x{k}x{d}",
        device=device,
        dtype=dtype,
        sizes={"n": n, "k": k, "d": d},
        flops=2.0 * n * k * d,
        bytes=float(values * (torch.finfo(DTYPES[dtype]).bits // 8) + 8 * n),
        state=state,
        inputs=inputs,
        eager=eager,
        runners=runners,
    )
