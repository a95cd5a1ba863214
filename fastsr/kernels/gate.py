"""The gate of channel attention, a small MLP on each image's vector of channels: what the ops that have one share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr.kernels import checks


def matrix(weight: Tensor) -> Tensor:
    """(O, I) from (O, I) or from the (O, I, 1, 1) of a 1x1 convolution."""
    return weight.flatten(1)


def check(
    op: str, x: Tensor, channels: int, down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None
) -> None:
    """The gate's parameters fit each other, `channels` and x's dtype."""
    checks.check_dtype(op, x, down_weight=down_weight, down_bias=down_bias, up_weight=up_weight, up_bias=up_bias)
    _check_matrix(op, "down_weight", down_weight, (None, channels), "(R, channels)")
    squeezed = down_weight.shape[0]
    if squeezed == 0:
        raise ValueError(f"{op}: down_weight has shape {tuple(down_weight.shape)}; expected at least one squeezed channel")
    checks.check_shape(op, "down_bias", down_bias, (squeezed,), "(R,)")
    _check_matrix(op, "up_weight", up_weight, (channels, squeezed), "(channels, R)")
    checks.check_shape(op, "up_bias", up_bias, (channels,), "(channels,)")


def _check_matrix(op: str, name: str, weight: Tensor, expected: tuple[int | None, int], meaning: str) -> None:
    checks.check_shape(op, name, weight, (*expected, 1, 1)[: max(2, weight.dim())], f"{meaning}, or that with two sizes of 1 behind")


def reference(pooled: Tensor, down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None) -> Tensor:
    """s = sigmoid(up * relu(down * pooled)), in plain PyTorch: (N, C) from (N, C)."""
    z = F.relu(F.linear(pooled, matrix(down_weight), down_bias))
    return torch.sigmoid(F.linear(z, matrix(up_weight), up_bias))
