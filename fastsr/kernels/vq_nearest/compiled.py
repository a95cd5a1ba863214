"""The call into the native library (csrc/cpu/vq_nearest.cpp), with its fake twin."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsr import _native


def search_into(indices: Tensor, distances: Tensor | None, rescored: Tensor | None, x: Tensor, codebook: Tensor, cosine: bool) -> None:
    """Fill int64 `indices` (O, H, I) and, where given, float32 `distances` of the same shape, both contiguous; add to `rescored`.

    x is (O, H, D, I) of any strides, the codebook (H, K, D); no size is zero."""
    torch.ops.fastsr.vq_nearest(x, codebook, cosine, indices, distances, rescored)


if _native.offers("vq_nearest"):

    @torch.library.register_fake("fastsr::vq_nearest")
    def _(x, codebook, cosine, indices, distances, rescored):  # type: ignore[no-untyped-def]
        return None
