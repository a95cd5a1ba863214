"""The gate of channel attention, a small MLP on each image's vector of channels: what the ops that have one share.

From the pooled p[n, c] of C channels: z = activation(down_weight p + down_bias), of R values; s = gate(up_weight z + up_bias).
Without down_weight, z = p and R = C.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr.kernels import checks

Gate = Literal["sigmoid", "hardsigmoid", "none"]
Activation = Literal["relu", "silu"]


def matrix(weight: Tensor) -> Tensor:
    """(O, I) from (O, I) or from the (O, I, 1, 1) of a 1x1 convolution."""
    return weight.flatten(1)


def check(
    op: str,
    x: Tensor,
    channels: int,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate: str = "sigmoid",
    activation: str = "relu",
) -> None:
    """The gate's parameters fit each other, `channels` and x's dtype."""
    checks.check_parameters(op, x, down_weight=down_weight, down_bias=down_bias, up_weight=up_weight, up_bias=up_bias)
    squeezed = channels
    if down_weight is not None:
        _check_matrix(op, "down_weight", down_weight, (None, channels), "(R, C)")
        squeezed = down_weight.shape[0]
        if squeezed == 0:
            raise ValueError(f"{op}: down_weight has shape {tuple(down_weight.shape)}; expected at least one squeezed channel")
        checks.check_shape(op, "down_bias", down_bias, (squeezed,), "(R,)")
    elif down_bias is not None:
        raise ValueError(f"{op}: down_bias has shape {tuple(down_bias.shape)}, but there is no down_weight")
    _check_matrix(op, "up_weight", up_weight, (channels, squeezed), "(C, R)" if down_weight is not None else "(C, C)")
    checks.check_shape(op, "up_bias", up_bias, (channels,), "(C,)")
    for name, given, known in (("gate", gate, get_args(Gate)), ("activation", activation, get_args(Activation))):
        if given not in known:
            raise ValueError(f"{op}: {name} is {given!r}; expected one of {', '.join(map(repr, known))}")


def _check_matrix(op: str, name: str, weight: Tensor, expected: tuple[int | None, int], meaning: str) -> None:
    checks.check_shape(op, name, weight, (*expected, 1, 1)[: max(2, weight.dim())], f"{meaning}, or that with two sizes of 1 behind")


def reference(
    pooled: Tensor,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate: str = "sigmoid",
    activation: str = "relu",
) -> Tensor:
    """s in plain PyTorch: (N, C) from (N, C)."""
    z = pooled
    if down_weight is not None:
        z = F.linear(z, matrix(down_weight), down_bias)
        z = F.relu(z) if activation == "relu" else F.silu(z)
    v = F.linear(z, matrix(up_weight), up_bias)
    if gate == "none":
        return v
    return torch.sigmoid(v) if gate == "sigmoid" else F.hardsigmoid(v)
