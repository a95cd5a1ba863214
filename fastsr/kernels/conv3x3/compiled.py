"""The call into the native library (csrc/cpu/conv3x3.cpp, csrc/cuda/conv3x3.cu), with its fake twin."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsr import _native
from fastsr.kernels.precision import takes_tf32


def conv3x3_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    negative_slope: float,
    scale: float,
    upsample: int,
    pixel_shuffle: int,
    packed: Tensor | None = None,
) -> None:
    """Write steps 1-5 of `fastsr.ops.conv3x3` into `out`; x, residual and out are pixel-major."""
    torch.ops.fastsr.conv3x3(x, weight, bias, residual, out, negative_slope, scale, upsample, pixel_shuffle, packed, takes_tf32(x))


if _native.offers("conv3x3"):

    @torch.library.register_fake("fastsr::conv3x3")
    def _(x, weight, bias, residual, out, negative_slope, scale, upsample, pixel_shuffle, packed=None, tf32=False):  # type: ignore[no-untyped-def]
        return None
