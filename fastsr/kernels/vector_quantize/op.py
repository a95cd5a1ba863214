"""Vector quantisation: the nearest code of each row, the losses of VQ-VAE and the statistics of its codes, in one pass.

For rows x[n, :] with D channels and codes e[k, :], over the M rows that `mask` keeps (all without one):

    1. index[n]        = nearest code, exactly as `fastsr.ops.vq_nearest` has it
    2. quantized[n, :] = e[index[n], :], bit for bit
    3. codebook_loss   = sum over n, c of (sg(x) - quantized)^2 / (M D);  its gradient goes to the codebook
    4. commitment_loss = sum over n, c of (x - sg(quantized))^2 / (M D);  its gradient goes to x        (sg: stop-gradient)
    5. counts[k]       = number of n with index[n] = k
    6. sums[k, :]      = sum of x[n, :] over them: what an EMA update of the codebook needs, and the codebook's gradient
    7. distances[n]    = |x[n] - quantized[n]|^2;  scores[n] = exp(-distances[n] / 10)
    8. mean_distance   = mean over all n, k of |x[n] - e[k]|^2, in closed form
    9. perplexity      = exp(-sum over k of p_k log(p_k + 1e-10)),  p_k = counts[k] / M

The gradient g of `quantized` goes to x, never to the codebook:

   10. "straight_through": dx = g
   11. "rotation":         dx = |q| / |x| * (g - 2 r (r . g) + 2 u (v . g)),  u = x / |x|, v = q / |q|, r = (u + v) / |u + v|

No beta stands in the losses: training adds codebook_loss + beta * commitment_loss, or beta * commitment_loss under EMA.

Sources: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv 1711.00937; Fifty et al., "Restructuring Vector
Quantization with the Rotation Trick", 2024, arXiv 2410.06424; scores and mean distance: CodeFormer, arXiv 2206.11253.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsr import backends
from fastsr.backends import FUSED_DTYPES, Backend, Rule
from fastsr.kernels import checks
from fastsr.kernels.vector_quantize import compiled, reference
from fastsr.kernels.vq_nearest.op import Metric, as_rows, row_shape
from fastsr.kernels.vq_nearest.reference import distance_dtype

backends.register(
    "vector_quantize",
    compiled=("cpu", "cuda"),
    triton=("cpu", "cuda"),
    rules=(
        Rule("compiled", "the search's certificate, no one-hot, one pass of statistics", "cpu", FUSED_DTYPES),
        Rule("compiled", "the search's certificate, no one-hot, sums of sorted rows; not measured yet", "cuda", FUSED_DTYPES),
        Rule("triton", "the same in Triton; for ROCm or without nvcc; not measured yet", "cuda", FUSED_DTYPES),
    ),
)


class VQOutput(NamedTuple):
    """What `vector_quantize` returns; the properties are computed when they are read."""

    quantized: Tensor  # x's shape, dtype and memory format
    indices: Tensor  # int64, x's shape without the channels
    codebook_loss: Tensor  # scalars: float32, float64 for float64 input
    commitment_loss: Tensor
    counts: Tensor  # int64 (K,) or (heads, K)
    sums: Tensor  # (K, D) or (heads, K, D): float32, float64 for float64 input
    distances: Tensor | None = None  # with return_distance: like indices, in float32 or float64
    mean_distance: Tensor | None = None  # with mean_distance: a scalar

    @property
    def scores(self) -> Tensor:
        """exp(-d / 10) of each row's distance d to its code."""
        if self.distances is None:
            raise AttributeError("scores need distances; call vector_quantize with return_distance=True")
        return torch.exp(-self.distances / 10)

    @property
    def perplexity(self) -> Tensor:
        """How many codes are in use, weighted by use: between 1 and K; per head where there are heads."""
        counts = self.counts.to(self.sums.dtype)
        p = counts / counts.sum(-1, keepdim=True).clamp_min(1)
        return torch.exp(-(p * torch.log(p + 1e-10)).sum(-1))


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "euclidean",
    channel_dim: int = -1,
    mask: Tensor | None = None,
    gradient: Literal["straight_through", "rotation"] = "straight_through",
    return_distance: bool = False,
    mean_distance: bool = False,
    backend: Backend = "auto",
) -> VQOutput:
    """Replace each row of `x` by its nearest code.

    Args:
        x: (..., D), or with `channel_dim=1` (N, D, H, W); float32, float16, bfloat16 or float64; any strides.
        codebook: (K, D); or (heads, K, D), with the heads of x just before its channels.
        metric: "euclidean", or "cosine": it chooses the code and changes nothing else. To quantise unit vectors, normalise x and
            codebook beforehand.
        channel_dim: which size of x holds the D channels.
        mask: bool, of the indices' shape or one that broadcasts to it. Rows where it is False have an index and a code, but no
            part in losses, counts and sums.
        gradient: how the gradient of `quantized` reaches x, steps 10 and 11.
        return_distance: also return step 7's distances.
        mean_distance: also return step 8 (one more pass over x, in float64).
        backend: "auto", "compiled", "triton" or "reference".

    Returns:
        VQOutput. Indices, counts, sums, distances and mean_distance have no gradient. With no row to count, losses are 0.

    Saved for backward: x and `quantized` (an input and an output), the indices and the mask; never the codebook, which an EMA
    step may have changed by then. Backward is first-order only (the reference differentiates any number of times).

    Autocast does not lower the precision: float16 and bfloat16 arguments are widened to float32 under it.

    Raises:
        ValueError: shapes that do not fit together, an unknown metric or gradient, a `channel_dim` that x does not have, a mask that
            is not bool.
        TypeError: an unsupported dtype, or dtypes that differ.
        BackendUnavailable: `backend` was named and cannot run here, with the reason and the remedy.
    """
    x, codebook = checks.autocast_float32(x, codebook)
    if gradient not in ("straight_through", "rotation"):
        raise ValueError(f"vector_quantize: gradient is {gradient!r}; expected 'straight_through' or 'rotation'")
    rows, codes = as_rows("vector_quantize", x, codebook, metric, channel_dim)
    shape = row_shape(x, channel_dim)
    kept = _mask_rows(mask, x, shape, rows)
    cosine, rotation = metric == "cosine", gradient == "rotation"
    run = backends.choose("vector_quantize", backend, rows).backend
    if run == "reference":
        parts = reference.vector_quantize(rows, codes, kept, cosine, rotation, return_distance)
    else:
        parts = reference.Parts(*_VectorQuantize.apply(rows, codes, kept, cosine, rotation, return_distance, run))
    heads = codebook.shape[:-2]
    return VQOutput(
        parts.quantized.view(x.shape),
        parts.indices.view(shape),
        parts.codebook_loss,
        parts.commitment_loss,
        parts.counts.view(*heads, -1),
        parts.sums.view(codebook.shape),
        None if parts.distances is None else parts.distances.view(shape),
        reference.mean_distance(rows, codes, kept) if mean_distance else None,
    )


def _mask_rows(mask: Tensor | None, x: Tensor, shape: tuple[int, ...], rows: Tensor) -> Tensor | None:
    """The mask as contiguous (O, H, I)."""
    if mask is None:
        return None
    fits = len(mask.shape) <= len(shape) and all(m in (1, s) for m, s in zip(reversed(mask.shape), reversed(shape), strict=False))
    if mask.dtype != torch.bool or mask.device != x.device or not fits:
        raise ValueError(
            f"vector_quantize: mask is {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}; "
            f"expected torch.bool on {x.device} that broadcasts to {tuple(shape)}"
        )
    o, h, _, i = rows.shape
    return mask.expand(shape).reshape(o, h, i).contiguous()


def _kernels(run: str) -> ModuleType:
    if run == "triton":
        from fastsr.kernels.vector_quantize import triton  # imported late: Triton costs seconds and may be missing

        return triton
    return compiled


class _VectorQuantize(torch.autograd.Function):
    """The one autograd boundary of the compiled and Triton backends."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool, rotation: bool, with_distance: bool, run: str
    ) -> tuple[Tensor | None, ...]:
        o, h, d, i = x.shape
        k, accumulate = codebook.shape[1], distance_dtype(x)
        quantized, indices = torch.empty_like(x), x.new_empty((o, h, i), dtype=torch.int64)
        loss = x.new_empty((), dtype=accumulate)
        counts, sums = x.new_empty((h, k), dtype=torch.int64), x.new_zeros((h, k, d), dtype=accumulate)
        distances = x.new_empty((o, h, i), dtype=accumulate) if with_distance else None
        if indices.numel():
            _kernels(run).quantize_into(quantized, indices, loss, counts, sums, distances, x, codebook.contiguous(), mask, cosine)
        else:
            loss.zero_()
            counts.zero_()
        ctx.options = (rotation, run, k)
        ctx.save_for_backward(x, quantized, indices, mask)
        ctx.mark_non_differentiable(indices, counts, sums, *(() if distances is None else (distances,)))
        ctx.set_materialize_grads(False)
        return quantized, indices, loss, loss.clone(), counts, sums, distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any, codebook_grad: Tensor | None, commitment_grad: Tensor | None, *__: Any) -> Any:
        rotation, run, k = ctx.options
        x, quantized, indices, mask = ctx.saved_tensors
        dx = dcodebook = None
        if ctx.needs_input_grad[0] and (grad is not None or commitment_grad is not None):
            if commitment_grad is None and not rotation:
                dx = grad
            else:
                dx = torch.empty_like(x)
                if dx.numel():
                    _kernels(run).input_gradient_into(dx, grad, commitment_grad, x, quantized, mask, rotation)
        if ctx.needs_input_grad[1] and codebook_grad is not None:
            dcodebook = x.new_zeros((x.shape[1], k, x.shape[2]))
            if x.numel():
                _kernels(run).codebook_gradient_into(dcodebook, codebook_grad, x, quantized, indices, mask)
        return dx, dcodebook, None, None, None, None, None
