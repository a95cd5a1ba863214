"""The residual dense block in plain PyTorch, concatenations and all: the truth for every test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_block(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None = None,
    *,
    negative_slope: float = 0.2,
    res_scale: float = 0.2,
    residual_scale: float = 1.0,
) -> Tensor:
    """Steps 1-3 of `fastsr.ops.dense_block`."""
    features = [x]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        a = F.conv2d(torch.cat(features, 1), weight, bias, padding=1)
        features.append(F.leaky_relu(a, negative_slope))
    y = F.conv2d(torch.cat(features, 1), weights[-1], biases[-1], padding=1) * res_scale + x
    return y if residual is None else y * residual_scale + residual
