"""Channel attention as modules: RCAN's, squeeze-and-excitation, and the test-time version with a local mean."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import Backend
from fastsr.nn.module import Conv3x3, Module, compute_dtype, scaled


class ChannelAttention(Module):
    """Scale every channel by a gate computed from its mean: y = res_scale * sigmoid(up(relu(down(mean(x))))) * x + residual.

    Run by `fastsr.ops.channel_attention`. Parameters, their names and their initialisation are those of BasicSR:
    `attention.1` (down) and `attention.3` (up), 1x1 convolutions with bias.

    Args:
        num_feat: channels.
        squeeze_factor: the gate's hidden layer has num_feat // squeeze_factor channels.
        backend: "auto", "compiled", "triton" or "reference".

    Attributes:
        local_window: None, or the side of the window whose mean stands for the picture's: see `local_mean`.
        float16_scale: see `fastsr.models.RCAN`; x is expected to be smaller by this power of two where it is float16.

    Source: Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", 2018, arXiv 1807.02758.
    """

    local_window: int | None = None
    float16_scale: float = 1.0

    def __init__(self, num_feat: int, squeeze_factor: int = 16, backend: Backend = "auto") -> None:
        super().__init__(backend)
        squeezed = num_feat // squeeze_factor if squeeze_factor > 0 else 0
        if squeezed < 1:
            raise ValueError(f"ChannelAttention: squeeze_factor is {squeeze_factor!r}; expected 1 to {num_feat}, the number of features")
        self.num_feat = num_feat
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(num_feat, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, num_feat, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor, residual: Tensor | None = None, res_scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        """(N, num_feat, H, W) -> the same shape; `out` as in `fastsr.ops.channel_attention`, with a local window it is not taken."""
        parameters = self.gate_parameters(compute_dtype(x))
        if self.local_window is None:
            return ops.channel_attention(x, *parameters, residual, res_scale=res_scale, out=out, backend=self.backend)
        down_weight, down_bias, up_weight, up_bias = parameters
        z = F.relu(F.conv2d(local_mean(x, self.local_window), down_weight, down_bias))
        y = x * torch.sigmoid(F.conv2d(z, up_weight, up_bias))
        return y * res_scale if residual is None else torch.add(residual, y, alpha=res_scale)

    def gate_parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gate's down and up weight, each with its bias, for features computed in `dtype`."""
        down, up = self.attention[1], self.attention[3]
        return scaled(down.weight, 1 / self.float16_scale, dtype), down.bias, up.weight, up.bias  # type: ignore[return-value, type-var, union-attr]


def local_mean(x: Tensor, window: int) -> Tensor:
    """The mean over a window around each pixel, for the test-time local converter.

        1. k_h = min(window, H);  k_w = min(window, W)
        2. m[n, c, i, j] = mean over a k_h x k_w box of x[n, c]      one for each place of the box inside of the image
        3. y = m, its border repeated so that pixel (h, w) has the box around it, moved into the image where it would reach out

    A window of the image's size or more gives the image's mean everywhere. Sums run along one side after the other in
    float32 (float64 stays), so that their error is that of a row.

    Source: Chu et al., "Improving Image Restoration by Revisiting Global Information Aggregation", 2021, arXiv 2112.04491.

    Returns:
        (N, C, H, W) in x's dtype; (N, C, 1, 1) where the window holds the whole image.
    """
    h, w = x.shape[2:]
    if window >= h and window >= w:
        return x.mean((2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
    means = x
    for dim, size in ((2, h), (3, w)):
        k = min(window, size)
        sums = F.pad(means.cumsum(dim, dtype=torch.promote_types(x.dtype, torch.float32)), (0, 0, 1, 0) if dim == 2 else (1, 0))
        means = (sums.narrow(dim, k, size - k + 1) - sums.narrow(dim, 0, size - k + 1)) / k
    bottom, right = h - means.shape[2], w - means.shape[3]
    padding = (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2)
    return F.pad(means, padding, "replicate").to(x.dtype)


class CAB(Module):
    """The channel attention block of HAT and DRCT: y = attention(conv(gelu(conv(x)))).

    Parameters as there: `cab.0`, `cab.2` (3x3 convolutions) and `cab.3.attention.{1,3}`.

    Args:
        num_feat: channels of the input and the output.
        compress_ratio: between the convolutions there are num_feat // compress_ratio channels.
        squeeze_factor: of the channel attention.
        backend: "auto", "compiled", "triton" or "reference".

    Source: Chen et al., "Activating More Pixels in Image Super-Resolution Transformer", 2022, arXiv 2205.04437.
    """

    def __init__(self, num_feat: int, compress_ratio: int = 3, squeeze_factor: int = 30, backend: Backend = "auto") -> None:
        super().__init__(backend)
        hidden = num_feat // compress_ratio if compress_ratio > 0 else 0
        if hidden < 1:
            raise ValueError(f"CAB: compress_ratio is {compress_ratio!r}; expected 1 to {num_feat}, the number of features")
        self.cab = nn.Sequential(
            Conv3x3(num_feat, hidden, backend=backend),
            nn.GELU(),
            Conv3x3(hidden, num_feat, backend=backend),
            ChannelAttention(num_feat, squeeze_factor, backend),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) -> the same shape, channels-last, in x's dtype (autocast's under autocast)."""
        return self.cab(x)


#: timm's names, and the classes that it takes in their place.
_ACTIVATIONS: dict[object, Literal["relu", "silu"]] = {
    "relu": "relu", nn.ReLU: "relu", "silu": "silu", "swish": "silu", nn.SiLU: "silu",
}  # fmt: skip
_GATES: dict[object, Literal["sigmoid", "hardsigmoid"]] = {
    "sigmoid": "sigmoid", nn.Sigmoid: "sigmoid", "hard_sigmoid": "hardsigmoid", nn.Hardsigmoid: "hardsigmoid",
}  # fmt: skip


class SqueezeExcite(Module):
    """Squeeze-and-excitation with timm's arguments and parameter names: y = x * gate(fc2(act(fc1(mean(x))))).

    Args:
        channels: of the input and the output.
        rd_ratio: the hidden layer has `channels * rd_ratio` channels, rounded to a multiple of `rd_divisor` (at least one).
        rd_channels: channels of the hidden layer; None for the rule above.
        bias: of the 1x1 convolutions `fc1` and `fc2`.
        act_layer: "relu" or "silu", or `torch.nn.ReLU` or `torch.nn.SiLU`.
        gate_layer: "sigmoid" or "hard_sigmoid", or `torch.nn.Sigmoid` or `torch.nn.Hardsigmoid`.
        backend: "auto", "compiled", "triton" or "reference".

    Raises:
        ValueError: another activation or gate, which the fused operator does not have.

    Source: Hu et al., "Squeeze-and-Excitation Networks", 2017, arXiv 1709.01507.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        bias: bool = True,
        act_layer: str | type[nn.Module] = "relu",
        gate_layer: str | type[nn.Module] = "sigmoid",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(backend)
        for name, given, known in (("act_layer", act_layer, _ACTIVATIONS), ("gate_layer", gate_layer, _GATES)):
            if given not in known:
                raise ValueError(f"SqueezeExcite: {name} is {given!r}; expected one of {', '.join(map(str, known))}")
        self.activation, self.gate = _ACTIVATIONS[act_layer], _GATES[gate_layer]
        hidden = rd_channels or max(rd_divisor, int(channels * rd_ratio + rd_divisor / 2) // rd_divisor * rd_divisor)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=bias)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> the same shape and memory format."""
        parameters = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return ops.channel_attention(x, *parameters, gate=self.gate, activation=self.activation, backend=self.backend)
