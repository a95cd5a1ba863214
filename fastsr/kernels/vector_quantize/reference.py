"""Vector quantisation in plain PyTorch: the truth for every test. Arguments are (O, H, D, I) and (H, K, D), checked by `op.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsr.kernels.vq_nearest import reference as nearest
from fastsr.kernels.vq_nearest.reference import distance_dtype

#: Norms count as no smaller than this in the rotation trick.
SMALLEST_NORM = 1e-12


class Parts(NamedTuple):
    """What a backend computes, without the optional outputs that follow from it."""

    quantized: Tensor  # (O, H, D, I)
    indices: Tensor  # (O, H, I)
    codebook_loss: Tensor
    commitment_loss: Tensor
    counts: Tensor  # (H, K)
    sums: Tensor  # (H, K, D)
    distances: Tensor | None  # (O, H, I)


def vector_quantize(x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool, rotation: bool, with_distance: bool) -> Parts:
    """Steps 1-6 of `fastsr.ops.vector_quantize`; `mask` is (O, H, I)."""
    o, h, d, i = x.shape
    k = codebook.shape[1]
    accumulate = distance_dtype(x)
    with torch.no_grad():
        indices, distances = nearest.search(x, codebook, cosine)
        flat = (indices + k * torch.arange(h, device=x.device)[:, None]).reshape(-1)
        kept = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
        counts = indices.new_zeros(h * k).index_add_(0, flat, kept.reshape(-1).long()).view(h, k)
        rows = torch.where(kept[:, :, None], x, 0).to(accumulate).transpose(2, 3).reshape(-1, d)
        sums = rows.new_zeros((h * k, d)).index_add_(0, flat, rows).view(h, k, d)
        values = (kept.sum() * d).clamp_min(1)
    q = codebook.reshape(h * k, d)[flat].view(o, h, i, d).transpose(2, 3)
    codebook_loss = _squares(q - x.detach(), kept, accumulate) / values
    commitment_loss = _squares(x - q.detach(), kept, accumulate) / values
    fixed = q.detach()
    path = _rotated(x.to(accumulate), fixed.to(accumulate)).to(x.dtype) if rotation else x
    quantized = _Gradient.apply(path, fixed)
    return Parts(quantized, indices, codebook_loss, commitment_loss, counts, sums, distances.to(accumulate) if with_distance else None)


def _squares(difference: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(kept[:, :, None], difference, 0).to(dtype).square().sum()


def _rotated(x: Tensor, q: Tensor) -> Tensor:
    """|q| / |x| times the rotation of x's direction onto q's, both held constant, applied to x."""
    with torch.no_grad():
        x_norm, q_norm = (torch.linalg.vector_norm(t, dim=2, keepdim=True).clamp_min(SMALLEST_NORM) for t in (x, q))
        u, v = x / x_norm, q / q_norm
        middle = u + v
        r = middle / torch.linalg.vector_norm(middle, dim=2, keepdim=True).clamp_min(SMALLEST_NORM)
        scale = q_norm / x_norm
    return scale * (x - 2 * r * (r * x).sum(2, keepdim=True) + 2 * v * (u * x).sum(2, keepdim=True))


class _Gradient(torch.autograd.Function):
    """The value of `value`, the gradient of `path`."""

    @staticmethod
    def forward(ctx: Any, path: Tensor, value: Tensor) -> Tensor:
        return torch.empty_like(path).copy_(value)  # in x's memory format

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def mean_distance(x: Tensor, codebook: Tensor, mask: Tensor | None) -> Tensor:
    """The mean squared distance of all rows that count to all codes, in float64 and without their matrix.

    mean |x - e|^2 = mean |x|^2 + mean |e|^2 - 2 mean x . mean e, of each head, then over heads."""
    with torch.no_grad():
        o, h, _, i = x.shape
        kept = torch.ones((o, h, i), dtype=torch.bool, device=x.device) if mask is None else mask
        rows = kept.sum((0, 2)).clamp_min(1)
        wide, codes = torch.where(kept[:, :, None], x, 0).double(), codebook.double()
        means = wide.sum((0, 3)) / rows[:, None]
        squares = wide.square().sum((0, 2, 3)) / rows + codes.square().sum((1, 2)) / codes.shape[1]
        return (squares - 2 * (means * codes.mean(1)).sum(1)).mean().to(distance_dtype(x))
