"""The calls into the native library (csrc/cpu/rcab.cpp, csrc/cuda/rcab.cu), with their fake twins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsr import _native
from fastsr.kernels.precision import takes_tf32


def forward_into(
    out: Tensor,
    hidden: Tensor,
    sums: Tensor,
    attention: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    res_scale: float,
    packed: Tensor | None = None,
) -> None:
    """Fill `hidden` with r, `sums` (N, M, 9) with T, `attention` (2, N, F) with p and s, and `out` with the block's output.

    x, hidden and out are pixel-major, weight2 is dense (contiguous or channels-last), all else contiguous."""
    vectors = (down_weight, down_bias, up_weight, up_bias)
    torch.ops.fastsr.rcab(x, weight1, bias1, weight2, bias2, *vectors, hidden, sums, attention, out, res_scale, packed, takes_tf32(x))


def backward_into(
    dx: Tensor | None,
    gradients: Sequence[Tensor],
    grad_hidden: Tensor,
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    sums: Tensor,
    attention: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    res_scale: float,
) -> None:
    """Fill the gradients of x (unless `dx` is None) and of the eight parameters (unless the list is empty).

    `grad_hidden` is like `hidden` and is scratch: the gradient of r before the ReLU. weight2 is contiguous."""
    saved, parameters = (grad, x, hidden, sums, attention), (weight1, weight2, bias2, down_weight, down_bias, up_weight)
    torch.ops.fastsr.rcab_backward(*saved, *parameters, grad_hidden, dx, gradients, res_scale, takes_tf32(x))


def hidden_into(hidden: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor | None) -> None:
    """Fill `hidden` alone, with the same bits."""
    torch.ops.fastsr.conv3x3(x, weight1, bias1, None, hidden, 0.0, 1.0, 1, 1, None, takes_tf32(x))


if _native.offers("rcab", "rcab_backward"):

    @torch.library.register_fake("fastsr::rcab")
    def _(x, weight1, bias1, weight2, bias2, down_weight, down_bias, up_weight, up_bias, hidden, sums, attention, out, res_scale, packed=None, tf32=False):  # type: ignore[no-untyped-def] # noqa: E501
        return None

    @torch.library.register_fake("fastsr::rcab_backward")
    def _(  # type: ignore[no-untyped-def]
        grad, x, hidden, sums, attention, weight1, weight2, bias2, down_weight, down_bias, up_weight, grad_hidden, dx, gradients, res_scale,
        tf32=False,
    ):
        return None
