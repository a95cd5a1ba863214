"""What networks do with a picture before their first convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def check_picture(network: str, x: Tensor, channels: int) -> None:
    """`x` is a batch of pictures with so many channels and at least one pixel."""
    if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[1:]:
        raise ValueError(f"{network}: x has shape {tuple(x.shape)}; expected (N, {channels}, H, W) with at least one pixel")


def unshuffled(x: Tensor, r: int) -> Tensor:
    """The pixel-unshuffle by r, after padding to a multiple of r by reflection, or by the edge where a picture is too small for that."""
    if r == 1:
        return x
    h, w = x.shape[2:]
    bottom, right = -h % r, -w % r
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom), "reflect" if bottom < h and right < w else "replicate")
    n, c, h, w = x.shape
    # not F.pixel_unshuffle, which hands back an empty batch unchanged
    return x.reshape(n, c, h // r, r, w // r, r).permute(0, 1, 3, 5, 2, 4).reshape(n, c * r * r, h // r, w // r)
