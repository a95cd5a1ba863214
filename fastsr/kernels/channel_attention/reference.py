"""Channel attention in plain PyTorch: the truth for every test, and the backend that always works."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    s = F.adaptive_avg_pool2d(x, 1)
    if down_weight is not None:
        s = F.conv2d(s, down_weight.view(*down_weight.shape[:2], 1, 1), down_bias)
        s = F.relu(s) if activation == "relu" else F.silu(s)
    s = F.conv2d(s, up_weight.view(*up_weight.shape[:2], 1, 1), up_bias)
    if gate != "none":
        s = torch.sigmoid(s) if gate == "sigmoid" else F.hardsigmoid(s)
    y = x * s
    if res_scale != 1.0:
        y = y * res_scale
    return y if residual is None else y + residual
