"""`upscale`: a network on a picture of any kind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr.upscaling import kinds

#: ITU-R BT.601: what a colour picture's grey is.
LUMA = (0.299, 0.587, 0.114)


def upscale(model: nn.Module, image: Any) -> Any:
    """Enlarge a picture with a super-resolution network; the result is of the kind that came in.

        1. The picture becomes (1, C, H, W) in the network's dtype and on its device, values 0..1.
        2. Colour (or grey, given to a colour network three times) goes through the network and is clamped to 0..1.
           Grey comes back as the luma of the result (ITU-R BT.601).
        3. Alpha is enlarged by bicubic interpolation.
        4. The result becomes the kind, dtype and device of the picture, integers rounded to nearest.

    Args:
        model: for instance from `fastsr.load`; called under `torch.no_grad`.
        image: one of
            a PIL image of any mode (palettes become RGB or RGBA; 16-bit grey stays 16-bit; CMYK and others become RGB);
            a NumPy array (H, W), or (H, W, C) with 1 grey, 2 grey + alpha, 3 RGB or 4 RGBA channels, of uint8, uint16 or
            floating point in 0..1;
            a tensor (C, H, W) or (N, C, H, W), floating point in 0..1, with the network's number of channels or one.

    Raises:
        TypeError: another kind of picture, or dtype.
        ValueError: a shape that is no picture's.
        FloatingPointError: the network gave NaN or infinity (seen in float16: use bfloat16 or float32).
    """
    picture, restore = kinds.to_tensor(image)
    channels = getattr(model, "num_in_ch", 3)
    colour, alpha = _split(picture, channels, alpha_allowed=not isinstance(image, Tensor))
    like = next(model.parameters())
    with torch.no_grad():
        grey = colour.shape[1] == 1 and channels == 3
        x = colour.to(like.device, like.dtype)
        y = model(x.expand(-1, 3, -1, -1) if grey else x)
        if not torch.isfinite(y).all():
            raise FloatingPointError(f"the network gave NaN or infinity in {like.dtype}; use bfloat16 or float32")
        y = y.to(picture.dtype).clamp_(0, 1)
        if grey and y.shape[1] == 3:
            y = (y * y.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        if alpha is not None:
            a = F.interpolate(alpha.to(y.device), size=y.shape[2:], mode="bicubic", align_corners=False).clamp_(0, 1)
            y = torch.cat([y, a], 1)
    return restore(y)


def _split(picture: Tensor, channels: int, alpha_allowed: bool) -> tuple[Tensor, Tensor | None]:
    """Colour and alpha of (N, C, H, W) for a network that takes `channels` channels."""
    c = picture.shape[1]
    if c == channels or (c == 1 and channels == 3):
        return picture, None
    if alpha_allowed and c in (2, 4) and (c - 1 == channels or (c == 2 and channels == 3)):
        return picture[:, :-1], picture[:, -1:]
    raise ValueError(f"upscale: the picture has {c} channels; expected {channels} for this network, or 1 (grey) for a colour network")
