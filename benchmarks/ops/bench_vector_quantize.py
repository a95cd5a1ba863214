"""A training step of a quantiser: forward, gradient of x through the code and the commitment loss, and the codebook's moving averages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsr import ops
from fastsr.bench.case import BASELINE, DTYPES, Builder, Case, Inputs, Runner, State
from fastsr.bench.cases.ops.bench_vq_nearest import SIZES, draw_codebook, draw_rows
from fastsr.bench.cases.peers import code_search
from fastsr.bench.suite import Options

DECAY = 0.99


def cases(options: Options) -> list[Case]:
    """One case for each size and dtype."""
    return [_case(options.device, dtype, size) for dtype in options.dtypes for size in SIZES[options.sizes]]


def _step(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    def step(x: Tensor, grad: Tensor, codebook: Tensor, size: Tensor, average: Tensor, decay: float) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        out = ops.vector_quantize(leaf, codebook, backend=backend)  # type: ignore[arg-type]
        (dx,) = torch.autograd.grad([out.quantized, out.commitment_loss], leaf, [grad, out.commitment_loss.new_full((), 0.25)])
        counts, sums = out.counts.to(size.dtype), out.sums.to(average.dtype)
        return out.quantized.detach(), dx, code_search.updated(counts, sums, size, average, decay)

    return step


def _case(device: str, dtype: str, size: tuple[int, int, int]) -> Case:
    n, k, d = size

    def state(generator: torch.Generator) -> State:
        codebook = draw_codebook(generator, k, d)
        return {"codebook": codebook, "size": torch.full((k,), n / k), "average": codebook * (n / k)}

    def inputs(generator: torch.Generator) -> Inputs:
        return draw_rows(generator, n, k, d), torch.randn(n, d, generator=generator)

    def build(step: Callable[..., tuple[Tensor, ...]]) -> Builder:
        return lambda state: lambda x, grad: step(x, grad, state["codebook"], state["size"], state["average"], DECAY)

    eager = build(code_search.one_hot_step)
    runners = {name: Runner(build(_step(name))) for name in ("auto", "compiled", "triton")}
    runners |= {BASELINE: Runner(eager), "eager, index_add_": Runner(build(code_search.scatter_step))}
    return Case(
        suite="ops",
        subject="vector_quantize",
        label=f"{n}x{k}x{d} training step",
        device=device,
        dtype=dtype,
        sizes={"n": n, "k": k, "d": d},
        flops=2.0 * n * k * d,
        bytes=float((7 * n * d + 4 * k * d) * (torch.finfo(DTYPES[dtype]).bits // 8)),
        state=state,
        inputs=inputs,
        eager=eager,
        runners=runners,
    )
