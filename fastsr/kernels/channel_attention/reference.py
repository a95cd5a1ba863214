"""Channel attention in plain PyTorch: the truth for every test, and the backend that always works."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastsr.kernels import gate as gates


def channel_attention(
    x: Tensor,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    res_scale: float = 1.0,
    gate: str = "sigmoid",
    activation: str = "relu",
) -> Tensor:
    """Steps 1-4 of `fastsr.ops.channel_attention`; weights may be matrices or 1x1 convolutions."""
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
    s = gates.reference(pooled, down_weight, down_bias, up_weight, up_bias, gate, activation)
    y = x * s[:, :, None, None]
    if res_scale != 1.0:
        y = y * res_scale
    return y if residual is None else y + residual
