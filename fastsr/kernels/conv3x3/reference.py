"""The fused 3x3 convolution in plain PyTorch: the truth for every test, and the backend that always works."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    negative_slope: float = 1.0,
    scale: float = 1.0,
    upsample: int = 1,
    pixel_shuffle: int = 1,
) -> Tensor:
    """Steps 1-5 of `fastsr.ops.conv3x3`; a `negative_slope` of 1 is no activation and 0 is ReLU."""
    if upsample != 1:
        x = F.interpolate(x, scale_factor=float(upsample), mode="nearest")
    y = F.conv2d(x, weight, bias, padding=1)
    if negative_slope == 0.0:
        y = F.relu(y)
    elif negative_slope != 1.0:
        y = F.leaky_relu(y, negative_slope)
    if pixel_shuffle != 1 and len(y):
        y = F.pixel_shuffle(y, pixel_shuffle)
    elif pixel_shuffle != 1:  # torch's own has a wrong backward for an empty batch
        n, c, h, w = y.shape
        y = y.reshape(n, c // pixel_shuffle**2, h * pixel_shuffle, w * pixel_shuffle)
    if scale != 1.0:
        y = y * scale
    return y if residual is None else y + residual
