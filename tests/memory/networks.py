"""Small networks of every kind that plans serve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastsr.models import RCAN, RRDBNet
from fastsr.nn import RRDB, ResidualDenseBlock


class ResBlock(nn.Module):
    """Someone else's residual block."""

    def __init__(self, channels: int, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels) if norm else nn.Identity(),
            nn.GELU(), nn.Dropout(dropout), nn.Conv2d(2 * channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Theirs(nn.Module):
    """Someone else's network around our blocks: a Sequential of RRDBs, a loop over dense blocks, a product at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.trunk = nn.Sequential(*(RRDB(16, 8) for _ in range(4)))
        self.loop = nn.ModuleList(ResidualDenseBlock(16, 8) for _ in range(2))
        self.tail = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.head(x)
        y = self.trunk(f)
        for block in self.loop:
            y = block(y)
        return self.tail(y * torch.sigmoid(f))


def plain_chain() -> nn.Sequential:
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.GELU())]
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), *layers)


def uneven_chain() -> nn.Sequential:
    """Sizes and shapes that differ along the chain; modules that work in place or change nothing."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(inplace=True), nn.Identity(), ResBlock(24), nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(24, 32, 3, padding=1), nn.Sigmoid(), ResBlock(32)), nn.PixelShuffle(2), nn.Tanh(), nn.Conv2d(8, 3, 1),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "rrdbnet": lambda: RRDBNet(3, 3, num_feat=16, num_grow_ch=8, num_block=4),
    "rrdbnet-x2-plus": lambda: RRDBNet(3, 3, scale=2, num_feat=16, num_grow_ch=8, num_block=2, plus=True),
    "rcan": lambda: RCAN(3, 3, num_feat=16, num_group=3, num_block=4, squeeze_factor=4),
    "plain-chain": plain_chain,
    "uneven-chain": uneven_chain,
    "res-blocks": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(ResBlock(8) for _ in range(5))),
    "theirs": Theirs,
}
