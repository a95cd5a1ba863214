"""The calls into the native library (csrc/cpu/channel_attention.cpp, csrc/cuda/channel_attention.cu), with their fake twins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsr import _native

#: The library's numbers for the gates and activations (csrc/common/gate.h).
GATES = {"none": 0, "sigmoid": 1, "hardsigmoid": 2}
ACTIVATIONS = {"relu": 0, "silu": 1}


def forward_into(
    out: Tensor,
    pooled: Tensor | None,
    gates: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    res_scale: float,
    gate: str,
    activation: str,
) -> None:
    """Write the output, and where they are given p and s, each (N, C) float32.

    x, residual and out are all pixel-major or all planar; the parameters are contiguous."""
    torch.ops.fastsr.channel_attention(
        x, down_weight, down_bias, up_weight, up_bias, residual, out, pooled, gates, res_scale, GATES[gate], ACTIVATIONS[activation]
    )


def backward_into(
    dx: Tensor | None,
    gradients: Sequence[Tensor | None],
    grad: Tensor,
    x: Tensor,
    pooled: Tensor,
    gates: Tensor,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor,
    res_scale: float,
    gate: str,
    activation: str,
) -> None:
    """Write the gradients of x and of down_weight, down_bias, up_weight and up_bias, each unless None.

    A bias's gradient is written with its weight's only."""
    torch.ops.fastsr.channel_attention_backward(
        grad, x, pooled, gates, down_weight, down_bias, up_weight, dx, *gradients, res_scale, GATES[gate], ACTIVATIONS[activation]
    )


if _native.offers("channel_attention", "channel_attention_backward"):

    @torch.library.register_fake("fastsr::channel_attention")
    def _(*arguments):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("fastsr::channel_attention_backward")
    def _(*arguments):  # type: ignore[no-untyped-def]
        return None
