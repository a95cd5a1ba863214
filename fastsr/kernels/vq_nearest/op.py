"""Nearest-code search that is exact and never builds the matrix of distances.

For rows x[n, :] and codes e[k, :] with D channels:

    1. metric "cosine": x and e are divided by their norms in float64 (a zero vector stays zero); "euclidean": they stay
    2. d[n, k]  = sum over c of (x[n, c] - e[k, c])^2, in float64 (the order of summation stands in reference.py)
    3. index[n] = argmin over k of d[n, k]: the lowest k of several minima; NaN is smaller than all, as in `torch.argmin`

The fused backends find the index without computing 2 for every code. From products in float32, or in lower precision, they have
scores s'[n, k] = |e_k|^2 / 2 - x_n . e_k that differ from the exact ones by at most a bound B[n] that covers every rounding,
underflow and that of 2 itself. A row whose second-best score exceeds the best by more than 2 B[n] is decided. Otherwise all codes with
s' <= min s' + 2 B[n] are compared by 2, and a row with too many of them, with overflow or with NaN is compared by 2 with every code. So
the index does not depend on backend, instruction set or thread count.

Plain PyTorch's |x|^2 - 2 x.e + |e|^2 is wrong for up to 1% of the rows at usual initialisations in float32, and for nearly all in
bfloat16 (docs/vector-quantization.md).

Source: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv 1711.00937; the certificate is this package's own.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from fastsr import backends
from fastsr.backends import FUSED_DTYPES, Backend, Rule
from fastsr.kernels import checks
from fastsr.kernels.vq_nearest import compiled, reference
from fastsr.kernels.vq_nearest.reference import distance_dtype

Metric = Literal["euclidean", "cosine"]

backends.register(
    "vq_nearest",
    compiled=("cpu", "cuda"),
    triton=("cpu", "cuda"),
    rules=(
        Rule("compiled", "no matrix of distances, float32 products with a certificate", "cpu", FUSED_DTYPES),
        Rule("compiled", "no matrix of distances, float16 tensor cores with a certificate; not measured yet", "cuda", FUSED_DTYPES),
        Rule("triton", "no distance matrix, float32 and a certificate; for ROCm or without nvcc; not measured yet", "cuda", FUSED_DTYPES),
    ),
)


def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "euclidean",
    channel_dim: int = -1,
    return_distance: bool = False,
    rescored: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The index of the code nearest to each row of `x`.

    Args:
        x: (..., D), or with `channel_dim=1` (N, D, H, W), read where it lies; float32, float16, bfloat16 or float64.
        codebook: (K, D); or (heads, K, D), with the heads of x just before its channels: (..., heads, D).
        metric: "euclidean", or "cosine" for the distance of unit vectors, 2 - 2 cos.
        channel_dim: which size of x holds the D channels.
        return_distance: also return the squared distance to the nearest code.
        rescored: None, or an int64 tensor of 2 on x's device, to which [rows decided among several candidates in float64, rows
            compared with every code in float64] are added. What "several" means is the backend's own: on a CPU codes within 2 B,
            on CUDA and in Triton groups of 8 codes that hold one. The reference adds nothing.
        backend: "auto", "compiled", "triton" or "reference".

    Returns:
        int64 indices in x's shape without the channels; with `return_distance` also step 2's d, rounded to float32 (float64 for
        float64 input). Neither has a gradient.

    Autocast does not lower the precision: float16 and bfloat16 arguments are widened to float32 under it.

    Raises:
        ValueError: shapes that do not fit together, an unknown metric, a `channel_dim` that x does not have.
        TypeError: an unsupported dtype, or dtypes that differ.
        BackendUnavailable: `backend` was named and cannot run here, with the reason and the remedy.
    """
    with torch.no_grad():
        x, codebook = checks.autocast_float32(x.detach(), codebook.detach())
        rows, codes = as_rows("vq_nearest", x, codebook, metric, channel_dim)
        check_rescored("vq_nearest", rescored, x)
        run = backends.choose("vq_nearest", backend, rows).backend
        indices, distances = search(rows, codes, metric == "cosine", return_distance, rescored, run)
        shape = row_shape(x, channel_dim)
        return (indices.view(shape), distances.view(shape)) if distances is not None else indices.view(shape)


def as_rows(op: str, x: Tensor, codebook: Tensor, metric: str, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Check the arguments; x as (O, heads, D, I), a view where its strides allow one, and the codebook as (heads, K, D).

    O stands for all sizes before the heads, I for all after the channels."""
    checks.check_dtype(op, x, codebook=codebook)
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"{op}: metric is {metric!r}; expected 'euclidean' or 'cosine'")
    if codebook.dim() not in (2, 3) or min(codebook.shape) == 0:
        raise ValueError(
            f"{op}: codebook has shape {tuple(codebook.shape)}; expected (K, D) or (heads, K, D) with at least one code and channel"
        )
    has_heads = codebook.dim() == 3
    if not -x.dim() <= channel_dim < x.dim():
        raise ValueError(f"{op}: channel_dim is {channel_dim} and x has shape {tuple(x.shape)}; expected one of its {x.dim()} sizes")
    at = channel_dim % x.dim()
    heads = codebook.shape[0] if has_heads else 1
    if x.shape[at] != codebook.shape[-1] or (has_heads and (at == 0 or x.shape[at - 1] != heads)):
        meaning = "(heads, K, D), so the heads and channels of x to be" if has_heads else "(K, D), so the channels of x to be"
        wanted = tuple(codebook.shape[::2]) if has_heads else codebook.shape[-1]
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} with channel_dim {channel_dim} and codebook has {tuple(codebook.shape)}; "
            f"expected {meaning} {wanted}"
        )
    outer, inner = x.shape[: at - has_heads], x.shape[at + 1 :]
    rows = x.reshape(outer.numel(), heads, x.shape[at], inner.numel())
    return rows, codebook if has_heads else codebook[None]


def row_shape(x: Tensor, channel_dim: int) -> tuple[int, ...]:
    """x's shape without the channels."""
    at = channel_dim % x.dim()
    return (*x.shape[:at], *x.shape[at + 1 :])


def check_rescored(op: str, rescored: Tensor | None, x: Tensor) -> None:
    """The counters, if given, can be written by a kernel."""
    if rescored is None:
        return
    if rescored.dtype != torch.int64 or rescored.shape != (2,) or not rescored.is_contiguous() or rescored.device != x.device:
        raise ValueError(
            f"{op}: rescored is {rescored.dtype} of shape {tuple(rescored.shape)} on {rescored.device}; "
            f"expected a contiguous int64 tensor of 2 on {x.device}"
        )


def search(
    rows: Tensor, codes: Tensor, cosine: bool, with_distance: bool, rescored: Tensor | None, run: str
) -> tuple[Tensor, Tensor | None]:
    """Indices (O, H, I) and, if asked for, distances of checked arguments, on a chosen backend."""
    if run == "reference":
        indices, exact = reference.search(rows, codes, cosine)
        return indices, exact.to(distance_dtype(rows)) if with_distance else None
    o, h, _, i = rows.shape
    indices = rows.new_empty((o, h, i), dtype=torch.int64)
    distances = rows.new_empty((o, h, i), dtype=torch.float32) if with_distance else None
    if indices.numel():
        _kernels(run).search_into(indices, distances, rescored, rows, codes.contiguous(), cosine)
    return indices, distances


def _kernels(run: str) -> ModuleType:
    if run == "triton":
        from fastsr.kernels.vq_nearest import triton  # imported late: Triton costs seconds and may be missing

        return triton
    return compiled
