"""A training step of a quantiser: forward, gradient of x through the code and the commitment loss, and the codebook's moving averages.

In several stages, as codecs have them, each quantises what the ones before left over, and has averages of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastsr import ops
from fastsr.bench.case import Builder, Call, Case, Inputs, Runner, State, element_size
from fastsr.bench.cases.ops.bench_vq_nearest import SIZES, Size, draw_codebooks, draw_rows, left_over, one_stage
from fastsr.bench.cases.peers import code_search
from fastsr.bench.cases.peers.rivals import Wrap, as_it_is, plain_runners
from fastsr.bench.suite import Options

DECAY = 0.99

#: (x, gradient, codebook, sizes, averages, decay) -> (codes, gradient of x, new codebook)
Step = Callable[..., tuple[Tensor, ...]]


def cases(options: Options) -> list[Case]:
    """One case for each size and dtype."""
    return [case(options, dtype, size) for dtype in options.dtypes for size in SIZES[options.sizes]]


def _step(backend: str) -> Step:
    def step(x: Tensor, grad: Tensor, codebook: Tensor, size: Tensor, average: Tensor, decay: float) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        out = ops.vector_quantize(leaf, codebook, backend=backend)  # type: ignore[arg-type]
        weight = out.commitment_loss.new_full((), code_search.COMMITMENT)
        (dx,) = torch.autograd.grad([out.quantized, out.commitment_loss], leaf, [grad, weight])
        return out.quantized.detach(), dx, code_search.updated(out.counts, out.sums, size, average, decay)

    return step


def _in_stages(step: Step, dtype: str) -> Step:
    """The sum of the stages' codes, the gradient through all of them, and the new codebooks."""

    def run(x: Tensor, grad: Tensor, codebook: Tensor, size: Tensor, average: Tensor, decay: float) -> tuple[Tensor, ...]:
        quantized, dx, books = torch.zeros_like(x), torch.zeros_like(x), []
        for book, book_size, book_average in zip(codebook, size, average, strict=True):
            q, d, updated = step(x, grad, book, book_size, book_average, decay)
            quantized, dx = quantized + q, dx + d
            books.append(updated)
            x, grad = left_over(x, q, dtype), torch.zeros_like(grad)  # the outer gradient reaches x once
        return quantized, dx, torch.stack(books)

    return run


def case(options: Options, dtype: str, size: Size) -> Case:
    """A step at one size."""
    n, k, d = size.n, size.k, size.d

    def state(generator: torch.Generator) -> State:
        codebook = draw_codebooks(generator, size)
        return {"codebook": codebook, "size": torch.full(codebook.shape[:-1], n / k), "average": codebook * (n / k)}

    def inputs(generator: torch.Generator) -> Inputs:
        return draw_rows(generator, size), torch.randn(n, d, generator=generator)

    def build(step: Step) -> Builder:
        whole = step if size.stages == 1 else _in_stages(step, dtype)
        return lambda state: lambda x, grad: whole(x, grad, state["codebook"], state["size"], state["average"], DECAY)

    def plain(wrap: Wrap) -> Builder:
        # What is differentiated and what is not are compiled apart.
        return build(code_search.step(wrap(code_search.quantized), wrap(code_search.scattered)))

    def library(state: State) -> Call:
        return code_search.vector_quantize_pytorch_step(state, DECAY)

    runners = {name: Runner(build(_step(name))) for name in ("auto", "compiled", "triton")}
    runners |= plain_runners(plain, dtype, options, images=False)
    expanded = functools.partial(code_search.quantized, search=code_search.expanded)
    runners["eager, one-hot"] = Runner(build(code_search.step(expanded, code_search.one_hot)))
    runners["vector-quantize-pytorch"] = Runner(one_stage(library, "this step of vector-quantize-pytorch"))
    codebooks = size.stages * k * (3 * d + 1)  # read with their averages and sizes, and written
    return Case(
        suite="ops",
        subject="vector_quantize",
        label=f"{size.label} training step",
        device=options.device,
        dtype=dtype,
        sizes=size.record(direction="forward+backward"),
        flops=size.flops,
        bytes=float((4 * n * d + codebooks) * element_size(dtype)),
        state=state,
        inputs=inputs,
        eager=plain(as_it_is),
        runners=runners,
    )
