"""What eager PyTorch computes with tf32 convolutions, on a CPU: the factors of every product are rounded to 10 bits of mantissa."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_plain = torch.nn.functional.conv2d


def rounded(x: Tensor) -> Tensor:
    """The nearest float32 values with 10 bits of mantissa, ties away from zero."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).view(x.shape)


class _Conv2d(torch.autograd.Function):
    """A 3x3 convolution whose products, and those of its gradients, take rounded factors; sums are float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _plain(rounded(x), rounded(weight), padding=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = rounded(grad)
        dx = torch.nn.grad.conv2d_input(x.shape, rounded(weight), grad, padding=1)
        return dx, torch.nn.grad.conv2d_weight(rounded(x), weight.shape, grad, padding=1)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **keywords: Any) -> Tensor:
    """`torch.nn.functional.conv2d`, its 3x3 convolutions of float32 in tf32."""
    if weight.shape[2:] != (3, 3) or x.dtype != torch.float32:
        return _plain(x, weight, bias, *args, **keywords)
    y = _Conv2d.apply(x, weight)
    return y if bias is None else y + bias[:, None, None]
