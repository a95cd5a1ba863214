"""Weights packed once, for inference with weights that no longer change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsr import _native
from fastsr.backends import FUSED_DTYPES


def pack_weights(weights: Sequence[Tensor], biases: Sequence[Tensor | None], pixel_shuffle: int = 1) -> Tensor | None:
    """Weights in the order in which the compiled kernels of this processor read them, for an op's `packed`.

    An op that gets them skips the packing that it otherwise does in every call. They hold the values of now: after any
    change of a weight, pack again. Handed to an op for which they do not fit (another dtype, shape or instruction
    set), they are ignored.

    Args:
        weights: the (O, C, 3, 3) weights of one op, all of one dtype.  biases: as many, each may be None.
        pixel_shuffle: as the op will get it.

    Returns:
        A tensor of bytes; None where no kernel takes packed weights (on a GPU they are packed by the launch itself).
    """
    first = weights[0]
    if first.device.type != "cpu" or first.dtype not in FUSED_DTYPES or not _native.offers("pack_weights"):
        return None
    with torch.no_grad():
        return torch.ops.fastsr.pack_weights(list(weights), list(biases), pixel_shuffle)


if _native.offers("pack_weights"):

    @torch.library.register_fake("fastsr::pack_weights")
    def _(weights, biases, pixel_shuffle):  # type: ignore[no-untyped-def]
        return weights[0].new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)
