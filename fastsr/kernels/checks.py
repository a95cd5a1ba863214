"""Argument checks, autocast and layout rules that every op shares. Messages print what was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsr.backends import autocasts

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)


def check_dtype(op: str, x: Tensor, **others: Tensor | None) -> None:
    """`x` is floating point and every other tensor has its dtype and device."""
    dtype, device = x.dtype, x.device
    if dtype not in FLOATS:
        raise TypeError(f"{op}: x has dtype {dtype}; expected float32, float64, bfloat16 or float16")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype} and x has {dtype}; expected the same")
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and x on {device}; expected the same device")


def check_shape(op: str, name: str, tensor: Tensor | None, expected: Sequence[int | None], meaning: str) -> None:
    """`tensor` (if given) has the expected shape, None standing for any size; `meaning` names the sizes."""
    if tensor is None or tensor.shape == expected:  # nearly every call ends here: an op has ten tensors, a network hundreds of ops
        return
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(e is not None and s != e for s, e in zip(shape, expected, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} has shape {shape}; expected ({wanted}) = {meaning}")


def check_parameters(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    """As `check_dtype`; but what `autocast_parameters` leaves in float32 beside an x of 16 bits is right, too."""
    if x.dtype in LOW and autocasts(x.device.type):
        parameters = {n: t for n, t in parameters.items() if t is not None and (t.dtype != torch.float32 or t.device != x.device)}
    check_dtype(op, x, **parameters)


def autocast_parameters(x: Tensor, *parameters: Any) -> tuple[Any, ...]:
    """Parameters (or None) as kernels take them beside an `x` that autocast has cast.

    Float32 parameters of an x of 16 bits stay: kernels round them while they pack or read them, one launch for an op where casts
    beforehand are one for each tensor, and their gradients come out in float32. Others are cast as autocast does.
    """
    if not parameters or not autocasts(x.device.type):
        return parameters
    if x.dtype in LOW and all(t is None or t.dtype == torch.float32 for t in parameters):
        return parameters
    return autocast(x, *parameters)[1:]


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast tensors (or None) as autocast casts the arguments of `conv2d`: float32 and low precisions, never float64."""
    device = next(t.device.type for t in tensors if t is not None)
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in (torch.float32, torch.bfloat16, torch.float16) else t for t in tensors)


def autocast_float32(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, widen float16 and bfloat16 tensors (or None) to float32, as torch does for operations that need its range."""
    if not autocasts(next(t.device.type for t in tensors if t is not None)):
        return tensors
    return tuple(t.float() if t is not None and t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def is_pixel_major(x: Tensor) -> bool:
    """True if the channels of each pixel of an (N, C, H, W) tensor lie side by side, as in channels-last
    tensors and in channel slices of them; the kernels read and write such tensors in place."""
    return x.shape[1] <= 1 or x.stride(1) == 1


def check_pixel_major(op: str, name: str, buffer: Tensor) -> None:
    """`buffer` can be written in place by a kernel: channels side by side, and no element written twice."""
    if not is_pixel_major(buffer):
        raise ValueError(
            f"{op}: {name} has strides {buffer.stride()}; expected channels side by side (stride 1), as in channels-last tensors"
        )
    if 0 in buffer.stride() and any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)):
        raise ValueError(f"{op}: {name} has strides {buffer.stride()}; an expanded tensor cannot be written in place")


def pixel_major(x: Tensor) -> Tensor:
    """`x` itself if its channels lie side by side, else a channels-last copy."""
    return x if is_pixel_major(x) else x.contiguous(memory_format=torch.channels_last)


def empty_pixels(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A fresh channels-last (N, channels, height, width) tensor."""
    return torch.empty(
        (like.shape[0], channels, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def is_planar(x: Tensor) -> bool:
    """True if the pixels of each channel of an (N, C, H, W) tensor lie end to end, as in NCHW tensors."""
    h, w = x.shape[2:]
    return (w <= 1 or x.stride(3) == 1) and (h <= 1 or x.stride(2) == w)


def in_one_layout(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All pixel-major or all planar, as `first` is (channels-last if it is neither); what differs is copied."""
    pixels, planes = is_pixel_major(first), is_planar(first)
    if pixels and planes:
        pixels = all(t is None or is_pixel_major(t) for t in others)
    if pixels or not planes:
        return tuple(t if t is None else pixel_major(t) for t in (first, *others))
    return tuple(t if t is None or is_planar(t) else t.contiguous() for t in (first, *others))


def empty_in_layout(like: Tensor) -> Tensor:
    """A fresh tensor with the shape and, if `like` has no gaps, the strides of `like`: pixel-major or planar as that is."""
    y = torch.empty_like(like)
    if (is_pixel_major(like) and is_pixel_major(y)) or (is_planar(like) and is_planar(y)):
        return y
    return empty_pixels(like, *like.shape[1:]) if is_pixel_major(like) else torch.empty_like(like, memory_format=torch.contiguous_format)
