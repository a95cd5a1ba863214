"""Nearest-code search: N rows against K codes of D channels, in one or several stages.

Rows are codes plus noise of their size, so that every formula that computes in float32 finds the same indices and none of these is left
out as wrong; how often they are wrong on less kind data stands in docs/vector-quantization.md. In several stages each searches what
the ones before left over, rounded to the case's dtype, and the codes shrink from stage to stage as those of trained codecs do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsr import ops
from fastsr.bench.case import DTYPES, Builder, Call, Case, Inputs, Runner, State, Unavailable, element_size
from fastsr.bench.cases.peers import code_search
from fastsr.bench.cases.peers.rivals import plain_runners
from fastsr.bench.gate import STATE_SEED
from fastsr.bench.suite import Options

#: From a stage's codes to the next one's.
SHRINK = 0.6


@dataclass(frozen=True)
class Size:
    """N rows, K codes, D channels, and the network that has them."""

    n: int
    k: int
    d: int
    network: str = ""
    stages: int = 1

    @property
    def label(self) -> str:
        """Sizes, then what they belong to."""
        stages = f", {self.stages} stages" if self.stages > 1 else ""
        return f"{self.n}x{self.k}x{self.d}" + (f" ({self.network}{stages})" if self.network else "")

    @property
    def flops(self) -> float:
        """Of the products."""
        return 2.0 * self.n * self.k * self.d * self.stages

    def record(self, **more: Any) -> dict[str, Any]:
        """The sizes of a case."""
        return {"n": self.n, "k": self.k, "d": self.d, "stages": self.stages, **more}


SIZES = {
    "tiny": (Size(40, 33, 5), Size(40, 33, 5, "codec", stages=3)),
    "quick": (Size(16384, 512, 64),),
    "full": (
        Size(16384, 512, 64),  # VQ-VAE: 16 images of 128x128
        Size(65536, 1024, 64),
        Size(16384, 8192, 256),
        Size(4096, 1024, 256, "VQGAN"),  # 16 images of 256x256, 16 pixels a code
        Size(4096, 16384, 256, "VQGAN"),
        Size(256, 1024, 256, "CodeFormer"),  # one face of 512x512
        Size(4800, 1024, 128, "EnCodec", stages=8),  # 64 seconds at 75 frames; 6 kbit/s
        Size(2376, 1024, 8, "DAC"),  # 72 excerpts of 0.38 s; each stage projects to 8 channels
    ),
}


def cases(options: Options) -> list[Case]:
    """One case for each size and dtype."""
    return [case(options, dtype, size) for dtype in options.dtypes for size in SIZES[options.sizes]]


def draw_codebooks(generator: torch.Generator, size: Size) -> Tensor:
    """Normal codes (stages, K, D) for several stages, else (K, D)."""
    books = torch.randn(size.stages, size.k, size.d, generator=generator)
    books *= SHRINK ** torch.arange(size.stages)[:, None, None]
    return books if size.stages > 1 else books[0]


def draw_rows(generator: torch.Generator, size: Size) -> Tensor:
    """Rows around sums of codes, one of each stage, that every process draws first."""
    books = draw_codebooks(torch.Generator().manual_seed(STATE_SEED), size).view(size.stages, size.k, size.d)
    rows = SHRINK ** (size.stages - 1) * torch.randn(size.n, size.d, generator=generator)
    for book in books:
        rows += book[torch.randint(size.k, (size.n,), generator=generator)]
    return rows


def left_over(x: Tensor, codes: Tensor, dtype: str) -> Tensor:
    """x - codes rounded to the case's dtype, so that the next stage's input is the same whoever computes, in float64 too."""
    return (x - codes).to(DTYPES[dtype]).to(x.dtype)


def in_stages(search: Callable[[Tensor, Tensor], Tensor], dtype: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The search of (K, D), or of (stages, K, D) one after the other: indices (N,) or (N, stages)."""

    def run(x: Tensor, codebook: Tensor) -> Tensor:
        if codebook.dim() == 2:
            return search(x, codebook)
        indices = []
        for book in codebook:
            indices.append(search(x, book))
            x = left_over(x, book[indices[-1]], dtype)
        return torch.stack(indices, 1)

    return run


def margin(inputs: Inputs, state: State, dtype: str) -> Tensor:
    """Whether a row's choice is clear; in several stages, those of all stages so far, since another code leaves something else over."""
    (x,), codebook = inputs, state["codebook"]
    if codebook.dim() == 2:
        return code_search.clear(x, codebook)
    stages = []
    for book in codebook:
        stages.append(code_search.clear(x, book))
        x = left_over(x, book[code_search.product(x, book)], dtype)
    return torch.stack(stages, 1).cummin(1).values


def one_stage(build: Builder, name: str) -> Builder:
    """A peer that has no residual search."""

    def build_one(state: State) -> Call:
        if state["codebook"].dim() == 3:
            raise Unavailable(f"{name} searches one stage")
        return build(state)

    return build_one


def case(options: Options, dtype: str, size: Size) -> Case:
    """The search of one size."""

    def state(generator: torch.Generator) -> State:
        return {"codebook": draw_codebooks(generator, size)}

    def inputs(generator: torch.Generator) -> Inputs:
        return (draw_rows(generator, size),)

    def search(function: Callable[..., Tensor]) -> Builder:
        return lambda state: functools.partial(in_stages(function, dtype), codebook=state["codebook"])

    runners = {name: Runner(search(functools.partial(ops.vq_nearest, backend=name))) for name in ("auto", "compiled", "triton")}
    runners |= plain_runners(lambda wrap: search(wrap(code_search.product)), dtype, options, images=False)
    runners |= {"eager, expanded": Runner(search(code_search.expanded)), "torch.cdist": Runner(search(code_search.cdist))}
    if dtype != "float32":
        runners[f"eager, {dtype} products"] = Runner(search(code_search.rounded))
        runners["eager, float32 sums"] = Runner(search(code_search.accumulated))
    runners |= {
        "vector-quantize-pytorch": Runner(code_search.vector_quantize_pytorch),
        "faiss IndexFlatL2": Runner(one_stage(code_search.faiss_flat, "faiss")),
        "flash-kmeans": Runner(one_stage(code_search.flash_kmeans, "flash-kmeans")),
    }
    values = (size.n + size.k * size.stages) * size.d
    return Case(
        suite="ops",
        subject="vq_nearest",
        label=size.label,
        device=options.device,
        dtype=dtype,
        sizes=size.record(),
        flops=size.flops,
        bytes=float(values * element_size(dtype) + 8 * size.n * size.stages),
        state=state,
        inputs=inputs,
        eager=search(code_search.product),
        runners=runners,
        margin=functools.partial(margin, dtype=dtype),
    )
