"""The calls into the native library (csrc/cpu/vector_quantize.cpp, csrc/cuda/vector_quantize.cu), with their fake twins.

x, `quantized` and their gradients are (O, H, D, I) of any strides, `indices`, `distances` and `mask` contiguous (O, H, I), codebooks
(H, K, D), losses and their gradients scalars; no size is zero."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastsr import _native


def fast_sums(x: Tensor) -> bool:
    """Whether a GPU adds the rows of each code by atomics, in another order each time: FASTSR_FAST_SUMS=1 asks for it, and torch's
    deterministic mode forbids it. Not measured yet (csrc/cuda/vq_atomic_sums.cuh)."""
    return x.device.type == "cuda" and os.environ.get("FASTSR_FAST_SUMS") == "1" and not torch.are_deterministic_algorithms_enabled()


def quantize_into(
    quantized: Tensor,
    indices: Tensor,
    loss: Tensor,
    counts: Tensor,
    sums: Tensor,
    distances: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    cosine: bool,
) -> None:
    """Fill everything before `x` (`sums` holds zeros): steps 1-7 of `fastsr.ops.vector_quantize`. Both losses have the value `loss`."""
    torch.ops.fastsr.vector_quantize(x, codebook, mask, cosine, fast_sums(x), quantized, indices, loss, counts, sums, distances)


def input_gradient_into(
    dx: Tensor, grad: Tensor | None, commitment_grad: Tensor | None, x: Tensor, quantized: Tensor, mask: Tensor | None, rotation: bool
) -> None:
    """Fill `dx`: step 10 or 11 of `grad`, plus 2 (x - quantized) / (M D) * commitment_grad in the rows that count; either may be None."""
    torch.ops.fastsr.vector_quantize_dx(grad, commitment_grad, x, quantized, mask, rotation, dx)


def codebook_gradient_into(
    dcodebook: Tensor, codebook_grad: Tensor, x: Tensor, quantized: Tensor, indices: Tensor, mask: Tensor | None
) -> None:
    """Fill `dcodebook` (zeros so far): for each code 2 / (M D) * codebook_grad * the sum of (quantized - x) over its rows that count."""
    torch.ops.fastsr.vector_quantize_dcodebook(codebook_grad, x, quantized, indices, mask, fast_sums(x), dcodebook)


if _native.offers("vector_quantize", "vector_quantize_dx", "vector_quantize_dcodebook"):

    @torch.library.register_fake("fastsr::vector_quantize")
    def _(x, codebook, mask, cosine, fast, quantized, indices, loss, counts, sums, distances):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("fastsr::vector_quantize_dx")
    def _(grad, commitment_grad, x, quantized, mask, rotation, dx):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("fastsr::vector_quantize_dcodebook")
    def _(codebook_grad, x, quantized, indices, mask, fast, dcodebook):  # type: ignore[no-untyped-def]
        return None
