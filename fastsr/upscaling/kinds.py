"""Kinds of pictures: each becomes a float tensor (N, C, H, W) in 0..1, and a function that leads back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsr.upscaling.deep import DeepPicture

Restore = Callable[[Tensor], Any]

EXPECTED = "expected a PIL image, a NumPy array (H, W[, C]) or a tensor ([N,] C, H, W)"


def to_tensor(image: Any) -> tuple[Tensor, Restore]:
    """The picture as (N, C, H, W), float32 (float64 stays) in 0..1, and what turns such a tensor into its kind again."""
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, DeepPicture):
        tensor, to_array = _from_array(image.pixels)
        return tensor, lambda y: DeepPicture(to_array(y), dict(image.info))
    pil = sys.modules.get("PIL.Image")  # whoever hands us a PIL image has imported it
    if pil is not None and isinstance(image, pil.Image):
        return _from_pil(image)
    raise TypeError(f"upscale: the picture is a {type(image).__name__}; {EXPECTED}")


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precisions would round the values before the network sees them."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _from_tensor(image: Tensor) -> tuple[Tensor, Restore]:
    if not image.is_floating_point():
        raise TypeError(f"upscale: the tensor has dtype {image.dtype}; expected floating point, values 0..1")
    if image.dim() not in (3, 4) or 0 in image.shape[-3:]:
        raise ValueError(f"upscale: the tensor has shape {tuple(image.shape)}; expected (C, H, W) or (N, C, H, W)")
    batch = image.detach() if image.dim() == 4 else image.detach()[None]
    return batch.to(_working_dtype(image.dtype)), lambda y: (y if image.dim() == 4 else y[0]).to(image.device, image.dtype)


def _from_array(image: np.ndarray) -> tuple[Tensor, Restore]:
    dtype, flat = image.dtype, image.ndim == 2
    if image.ndim not in (2, 3) or image.size == 0 or (not flat and image.shape[2] > 4):
        raise ValueError(f"upscale: the array has shape {image.shape}; expected (H, W) or (H, W, C) with at most 4 channels")
    if dtype in (np.uint8, np.uint16):
        top = float(np.iinfo(dtype).max)
        values = image.astype(np.float32) / np.float32(top)
    elif dtype.kind == "f":
        top = 0.0
        values = image.astype(np.float64 if dtype == np.float64 else np.float32)
    else:
        raise TypeError(f"upscale: the array has dtype {dtype}; expected uint8, uint16 or floating point")
    tensor = torch.from_numpy(np.ascontiguousarray(values[:, :, None] if flat else values)).permute(2, 0, 1)[None]

    def restore(y: Tensor) -> np.ndarray:
        y = y[0].permute(1, 2, 0)
        array = (y.mul(top).round() if top else y).cpu().numpy().astype(dtype)
        return np.ascontiguousarray(array[:, :, 0] if flat else array)

    return tensor, restore


def _from_pil(image: Any) -> tuple[Tensor, Restore]:
    from PIL import Image

    info = {key: image.info[key] for key in ("icc_profile", "exif", "dpi") if image.info.get(key)}
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"upscale: the picture of mode 'I' has values {values.min()}..{values.max()}; expected 0..65535")
        tensor, to_array = _from_array(values.astype(np.uint16))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min(initial=0) >= 0 and values.max(initial=0) <= 1):  # also NaN
            raise ValueError(f"upscale: the picture of mode 'F' has values {values.min()}..{values.max()}; expected 0..1")
        tensor, to_array = _from_array(values)
    else:
        plain = image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert(_plain_mode(image))
        if plain.mode != image.mode and image.mode not in ("P", "1"):
            info.pop("icc_profile", None)  # it describes the colour space that the picture has just left
        tensor, to_array = _from_array(np.asarray(plain))

    def restore(y: Tensor) -> Any:
        result = Image.fromarray(to_array(y))
        result.info.update(info)
        return result

    return tensor, restore


def _plain_mode(image: Any) -> str:
    """The mode with 8 bits a channel that loses least."""
    if image.mode == "1":
        return "L"
    if image.mode in ("RGBa", "La", "PA") or "transparency" in image.info:
        return "LA" if image.mode == "La" else "RGBA"
    return "RGB"
