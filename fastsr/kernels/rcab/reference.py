"""The residual channel attention block in plain PyTorch: the truth for every test, and the backend that always works."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastsr.kernels import gate


def rcab(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    res_scale: float = 1.0,
) -> Tensor:
    """Steps 1-4 of `fastsr.ops.rcab`, the pooling after the second convolution."""
    r = F.relu(F.conv2d(x, weight1, bias1, padding=1))
    u = F.conv2d(r, weight2, bias2, padding=1)
    s = gate.reference(u.mean((2, 3)), down_weight, down_bias, up_weight, up_bias)
    return u * s[:, :, None, None] * res_scale + x
