"""RCAN in plain torch.nn, as BasicSR and as its authors have it: what the fused network is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.eager_rrdbnet import conv

MEAN = (0.4488, 0.4371, 0.4040)

#: scale of the tail -> factors of its steps
STEPS = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2), 16: (2, 2, 2, 2)}


def attention(feat: int, squeeze: int, pool: bool) -> nn.Sequential:
    layers = [nn.Conv2d(feat, feat // squeeze, 1), nn.ReLU(), nn.Conv2d(feat // squeeze, feat, 1), nn.Sigmoid()]
    return nn.Sequential(*([nn.AdaptiveAvgPool2d(1)] if pool else []), *layers)


def tail(feat: int, scale: int) -> nn.Sequential:
    return nn.Sequential(*(layer for r in STEPS[scale] for layer in (conv(feat, r * r * feat), nn.PixelShuffle(r))))


class EagerChannelAttention(nn.Module):
    def __init__(self, feat: int, squeeze: int) -> None:
        super().__init__()
        self.attention = attention(feat, squeeze, pool=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


class EagerRCAB(nn.Module):
    def __init__(self, feat: int, squeeze: int, res_scale: float = 1) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.rcab = nn.Sequential(conv(feat, feat), nn.ReLU(), conv(feat, feat), EagerChannelAttention(feat, squeeze))

    def forward(self, x: Tensor) -> Tensor:
        return self.rcab(x) * self.res_scale + x


class EagerResidualGroup(nn.Module):
    def __init__(self, feat: int, blocks: int, squeeze: int, res_scale: float = 1) -> None:
        super().__init__()
        self.residual_group = nn.Sequential(*(EagerRCAB(feat, squeeze, res_scale) for _ in range(blocks)))
        self.conv = conv(feat, feat)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.residual_group(x)) + x


class EagerRCAN(nn.Module):
    """BasicSR's keys and arithmetic: the mean is no parameter, `res_scale` counts."""

    def __init__(
        self,
        num_in_ch: int,
        num_out_ch: int,
        num_feat: int = 64,
        num_group: int = 10,
        num_block: int = 20,
        squeeze_factor: int = 16,
        upscale: int = 4,
        res_scale: float = 1,
        img_range: float = 255.0,
        rgb_mean: tuple[float, ...] = MEAN,
        unshuffle: int = 1,
    ) -> None:
        super().__init__()
        self.img_range, self.unshuffle, self.mean = img_range, unshuffle, torch.tensor(rgb_mean, dtype=torch.float64)
        self.conv_first = conv(num_in_ch * unshuffle**2, num_feat)
        self.body = nn.Sequential(*(EagerResidualGroup(num_feat, num_block, squeeze_factor, res_scale) for _ in range(num_group)))
        self.conv_after_body = conv(num_feat, num_feat)
        self.upsample = tail(num_feat, upscale * unshuffle)
        self.conv_last = conv(num_feat, num_out_ch)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean.to(x)[:, None, None]
        x = self.conv_first(F.pixel_unshuffle((x - mean) * self.img_range, self.unshuffle))
        x = self.conv_after_body(self.body(x)) + x
        return self.conv_last(self.upsample(x)) / self.img_range + mean


class OfficialAttention(nn.Module):
    def __init__(self, feat: int, squeeze: int) -> None:
        super().__init__()
        self.conv_du = attention(feat, squeeze, pool=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(F.adaptive_avg_pool2d(x, 1))


class Skipped(nn.Module):
    """`body`, and its input added: a block, and a group of blocks."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class OfficialRCAN(nn.Module):
    """Its authors' keys and arithmetic, for pictures of 0..1: values of 0..255 inside, MeanShift layers, no `res_scale`."""

    def __init__(
        self, feat: int = 64, groups: int = 10, blocks: int = 20, squeeze: int = 16, scale: int = 4, norm: bool = True, unshuffle: int = 1
    ) -> None:
        super().__init__()
        self.range = 255.0 if norm else 1.0
        if norm:
            self.sub_mean, self.add_mean = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            for sign, layer in ((-1, self.sub_mean), (1, self.add_mean)):
                layer.weight.data = torch.eye(3).view(3, 3, 1, 1)
                layer.bias.data = sign * 255.0 * torch.tensor(MEAN)
        else:
            self.sub_mean = self.add_mean = nn.Identity()

        def block() -> Skipped:
            return Skipped(conv(feat, feat), nn.ReLU(), conv(feat, feat), OfficialAttention(feat, squeeze))

        head = [conv(3 * unshuffle**2, feat)]
        self.head = nn.Sequential(*([nn.PixelUnshuffle(unshuffle)] if unshuffle > 1 else []), *head)
        self.body = nn.Sequential(*(Skipped(*(block() for _ in range(blocks)), conv(feat, feat)) for _ in range(groups)), conv(feat, feat))
        self.tail = nn.Sequential(tail(feat, scale * unshuffle), conv(feat, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.sub_mean(x * self.range))
        return self.add_mean(self.tail(self.body(x) + x)) / self.range
