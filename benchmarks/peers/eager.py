"""RRDBNet and RCAN as anyone would write them in plain PyTorch: what the networks of this package are measured against.

Parameter names are BasicSR's, so that a state_dict fits both sides.
RRDBNet: Wang et al., "ESRGAN", 2018, arXiv 1809.00219. RCAN: Zhang et al., 2018, arXiv 1807.02758.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(cin: int, cout: int) -> nn.Conv2d:
    """A 3x3 convolution with same padding."""
    return nn.Conv2d(cin, cout, 3, 1, 1)


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees all that came before."""

    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        for i in range(5):
            setattr(self, f"conv{i + 1}", conv(num_feat + i * num_grow_ch, num_feat if i == 4 else num_grow_ch))

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same."""
        seen = [x]
        for i in range(1, 5):
            seen.append(F.leaky_relu(getattr(self, f"conv{i}")(torch.cat(seen, 1)), 0.2))
        return self.conv5(torch.cat(seen, 1)) * 0.2 + x


class RRDB(nn.Module):
    """Three dense blocks and an outer skip."""

    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(num_feat, num_grow_ch) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same."""
        return self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x


class RRDBNet(nn.Module):
    """ESRGAN's generator, enlarging by 4."""

    def __init__(self, num_in_ch: int = 3, num_out_ch: int = 3, num_feat: int = 64, num_block: int = 23, num_grow_ch: int = 32) -> None:
        super().__init__()
        self.conv_first = conv(num_in_ch, num_feat)
        self.body = nn.Sequential(*(RRDB(num_feat, num_grow_ch) for _ in range(num_block)))
        self.conv_body = conv(num_feat, num_feat)
        self.conv_up1, self.conv_up2, self.conv_hr = (conv(num_feat, num_feat) for _ in range(3))
        self.conv_last = conv(num_feat, num_out_ch)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W) to (N, num_out_ch, 4H, 4W)."""
        x = self.conv_first(x)
        x = x + self.conv_body(self.body(x))
        for layer in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(layer(F.interpolate(x, scale_factor=2.0, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


class ChannelAttention(nn.Module):
    """Scale each channel by a gate computed from its mean."""

    def __init__(self, num_feat: int, squeeze_factor: int) -> None:
        super().__init__()
        squeezed = num_feat // squeeze_factor
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(num_feat, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, num_feat, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same."""
        return x * self.attention(x)


class RCAB(nn.Module):
    """Residual channel attention block."""

    def __init__(self, num_feat: int, squeeze_factor: int) -> None:
        super().__init__()
        self.rcab = nn.Sequential(conv(num_feat, num_feat), nn.ReLU(), conv(num_feat, num_feat), ChannelAttention(num_feat, squeeze_factor))

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same."""
        return self.rcab(x) + x


class ResidualGroup(nn.Module):
    """Blocks, a convolution and a skip."""

    def __init__(self, num_feat: int, num_block: int, squeeze_factor: int) -> None:
        super().__init__()
        self.residual_group = nn.Sequential(*(RCAB(num_feat, squeeze_factor) for _ in range(num_block)))
        self.conv = conv(num_feat, num_feat)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_feat, H, W) to the same."""
        return self.conv(self.residual_group(x)) + x


class RCAN(nn.Module):
    """Residual channel attention network."""

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_group: int = 10,
        num_block: int = 20,
        squeeze_factor: int = 16,
        upscale: int = 4,
    ) -> None:
        super().__init__()
        self.conv_first = conv(num_in_ch, num_feat)
        self.body = nn.Sequential(*(ResidualGroup(num_feat, num_block, squeeze_factor) for _ in range(num_group)))
        self.conv_after_body = conv(num_feat, num_feat)
        steps: list[nn.Module] = []
        for _ in range(int(math.log2(upscale))):
            steps += [conv(num_feat, 4 * num_feat), nn.PixelShuffle(2)]
        self.upsample = nn.Sequential(*steps)
        self.conv_last = conv(num_feat, num_out_ch)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W) to (N, num_out_ch, upscale * H, upscale * W)."""
        x = self.conv_first(x)
        return self.conv_last(self.upsample(self.conv_after_body(self.body(x)) + x))


def conv_flops(model: nn.Module, height: int, width: int) -> float:
    """Floating-point operations (a multiply-add is two) of all convolutions of `model`, transposed ones too, for one image of this size.

    Build `model` on the meta device: then nothing is computed.
    """
    total = 0.0

    def count(module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal total
        assert isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        per_weight = given[0] if isinstance(module, nn.ConvTranspose2d) else y  # where each weight is used once a pixel
        total += 2.0 * module.weight.numel() * per_weight.shape[0] * per_weight.shape[2] * per_weight.shape[3]

    convolutions = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]
    hooks = [module.register_forward_hook(count) for module in convolutions]
    try:
        model(torch.empty(1, convolutions[0].in_channels, height, width, device=convolutions[0].weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return total
