"""Blocks as other people spell them, written anew: what `fuse_` should know, and what it must leave alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class DenseSequential(nn.Module):
    """As the oldest ESRGAN has it: each convolution in a Sequential with its activation."""

    def __init__(self, feat: int = 8, grow: int = 4, count: int = 5, slope: float = 0.1, scale: float = 0.25) -> None:
        super().__init__()
        self.scale = scale
        for k in range(count - 1):
            setattr(self, f"step{k}", nn.Sequential(conv(feat + k * grow, grow), nn.LeakyReLU(slope, inplace=True)))
        self.out = nn.Sequential(conv(feat + (count - 1) * grow, feat, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for name, step in self.named_children():
            if name != "out":
                seen = torch.cat([seen, step(seen)], 1)
        return self.out(seen).mul(self.scale) + x


class DenseRelu(nn.Module):
    """Functional ReLU, no scale, parts registered in another order than they run, one activation shared."""

    def __init__(self, feat: int = 6) -> None:
        super().__init__()
        self.last, self.middle, self.first = conv(feat + 7, feat), conv(feat + 3, 4), conv(feat, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.first(x))
        b = F.relu(self.middle(torch.cat((x, a), 1)))
        return x + self.last(torch.cat((x, a, b), 1))


class Noise(nn.Module):
    """Multiplied with the values while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        drawn = torch.randn(x.shape, device=x.device)  # float32 whatever x is: the same numbers for the same seed
        return x + (self.mean + drawn).to(x.dtype) * 0.1 * x.detach()


class DensePlus(DenseSequential):
    """ESRGAN+'s; with `squeeze` the pointwise convolution has other channels, which are repeated."""

    def __init__(self, squeeze: int = 1) -> None:
        super().__init__()
        self.shortcut, self.squeeze = conv(8, 4 // squeeze, 1), squeeze

    def forward(self, x: Tensor) -> Tensor:
        a = self.step0(x)
        b = self.step1(torch.cat((x, a), 1)) + self.shortcut(x).repeat(1, self.squeeze, 1, 1)
        c = self.step2(torch.cat((x, a, b), 1))
        d = self.step3(torch.cat((x, a, b, c), 1)) + b
        return self.out(torch.cat((x, a, b, c, d), 1)) * self.scale + x


class DensePlusNoisy(DensePlus):
    """Noise as a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(super().forward(x))


class DensePlusDrawing(DensePlus):
    """Noise in the code."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


class DensePlusGain(DensePlus):
    """A number of its own that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class EfficientGate(nn.Module):
    """ECA: a convolution along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid().view(*x.shape[:2], 1, 1)


class Chain(nn.Module):
    """Dense blocks in a Sequential of its own, with a scaled skip around: not an RRDB to us (one child), its blocks are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = DenseSequential(), DenseSequential()

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.b(self.a(x))


class LinearGate(nn.Module):
    """Squeeze-and-excitation with linear layers and a view."""

    def __init__(self, channels: int = 8, squeezed: int = 4) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed, bias=False), nn.ReLU(inplace=True), nn.Linear(squeezed, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        return x * self.fc(x.mean((2, 3))).view(n, c, 1, 1).expand_as(x)


class FunctionalGate(nn.Module):
    """RealCUGAN's: all by functions; with a branch for half precision."""

    def __init__(self, channels: int = 8, squeezed: int = 4) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(channels, squeezed, 1), conv(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.mean(x.float(), (2, 3), keepdim=True).half() if x.dtype == torch.half else torch.mean(x, (2, 3), keepdim=True)
        return torch.mul(x, torch.sigmoid(self.conv2(F.relu(self.conv1(pooled), inplace=True))))


class HardGate(nn.Module):
    """MobileNetV3's, and with `squeeze=False` the effective squeeze-and-excitation: one layer."""

    def __init__(self, channels: int = 8, squeeze: bool = True) -> None:
        super().__init__()
        self.fc1 = conv(channels, 3, 1) if squeeze else nn.Identity()
        self.act = nn.SiLU() if squeeze else nn.Identity()
        self.fc2 = conv(3 if squeeze else channels, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class NoGate(nn.Module):
    """NAFNet-like and OmniSR's simple one: no sigmoid."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.gap, self.fc = nn.AdaptiveAvgPool2d(1), conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(self.gap(x))


class AttentionTail(nn.Module):
    """HAT's CAB, or with a skip and a scale an RCAB with other activations."""

    def __init__(self, feat: int = 8, hidden: int = 3, act: nn.Module | None = None, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.cab = nn.Sequential(conv(feat, hidden), act or nn.GELU(), conv(hidden, feat), FunctionalGate(feat))

    def forward(self, x: Tensor) -> Tensor:
        y = self.cab(x)
        return y if self.scale is None else y * self.scale + x


class InPlaceRcab(nn.Module):
    """`res += x`, as the authors of RCAN write it; a scale that is there and not used."""

    def __init__(self, feat: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(feat, feat), nn.ReLU(True), conv(feat, feat), FunctionalGate(feat))
        self.res_scale = 0.1

    def forward(self, x: Tensor) -> Tensor:
        res = self.body(x)
        res += x
        return res


class Noisy(DenseSequential):
    """A subclass that adds noise while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


class Muted(DenseSequential):
    """A subclass that does something else while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else super().forward(x)


class Normed(DenseRelu):
    """With a norm that has no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.instance_norm(x))


class Vandal(DenseRelu):
    """Writes into its argument."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.mul_(2)
        return y


class Measuring(DenseRelu):
    """Looks at the values of its input, to no end."""

    def forward(self, x: Tensor) -> Tensor:
        if x.detach().abs().sum().item() < 0:
            raise ValueError("it is negative")
        return super().forward(x)


class Gain(DenseRelu):
    """A number of its own that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain
