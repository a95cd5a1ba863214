"""RRDBNet in plain torch.nn, as its paper describes it: what the fused network is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class EagerResidualDenseBlock(nn.Module):
    """With `plus`, as in ESRGAN+: conv1x1(x) is added to the second output and the second to the fourth."""

    def __init__(self, feat: int, grow: int, plus: bool = False) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(feat, grow, 1, bias=False) if plus else None
        for k in range(4):
            setattr(self, f"conv{k + 1}", conv(feat + k * grow, grow))
        self.conv5 = conv(feat + 4 * grow, feat)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for k, layer in enumerate((self.conv1, self.conv2, self.conv3, self.conv4), 1):
            grown = F.leaky_relu(layer(torch.cat(seen, 1)), 0.2)
            if self.conv1x1 is not None and k in (2, 4):
                grown = grown + (self.conv1x1(x) if k == 2 else seen[2])
            seen.append(grown)
        return self.conv5(torch.cat(seen, 1)) * 0.2 + x


class EagerRRDB(nn.Module):
    def __init__(self, feat: int, grow: int, plus: bool = False) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (EagerResidualDenseBlock(feat, grow, plus) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x


class EagerRRDBNet(nn.Module):
    """Image sizes must be multiples of the pixel-unshuffle factor."""

    def __init__(
        self,
        num_in_ch: int,
        num_out_ch: int,
        scale: int = 4,
        num_feat: int = 64,
        num_block: int = 23,
        num_grow_ch: int = 32,
        unshuffle: int | None = None,
        plus: bool = False,
    ) -> None:
        super().__init__()
        self.scale, self.unshuffle = scale, unshuffle or {1: 4, 2: 2}.get(scale, 1)
        self.conv_first = conv(num_in_ch * self.unshuffle**2, num_feat)
        self.body = nn.Sequential(*(EagerRRDB(num_feat, num_grow_ch, plus) for _ in range(num_block)))
        self.conv_body = conv(num_feat, num_feat)
        self.ups = [f"conv_up{k + 1}" for k in range({1: 0, 2: 1, 4: 2, 8: 3, 16: 4}[scale * self.unshuffle])]
        for name in self.ups:
            setattr(self, name, conv(num_feat, num_feat))
        self.conv_hr, self.conv_last = conv(num_feat, num_feat), conv(num_feat, num_out_ch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_first(F.pixel_unshuffle(x, self.unshuffle))
        x = self.conv_body(self.body(x)) + x
        for name in self.ups:
            x = F.leaky_relu(getattr(self, name)(F.interpolate(x, scale_factor=2.0, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))
