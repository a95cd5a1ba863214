"""3x3 convolutions in an `nn.Sequential`, with the upsampling before them and the activation and PixelShuffle behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import Backend
from fastsr.fusion.families.family import Candidate, Fusion, Probe
from fastsr.fusion.structure import Refused, check_plain, has_hooks, part


@dataclass(frozen=True)
class Run:
    """Children `first` to `stop - 1` of a Sequential, which are one call of `fastsr.ops.conv3x3`."""

    first: int
    stop: int
    conv: int
    upsample: int = 1
    negative_slope: float = 1.0
    pixel_shuffle: int = 1


@dataclass(frozen=True)
class Convolutions(Fusion):
    """The runs of a Sequential by `fastsr.ops.conv3x3`; all its other children are called as before."""

    kind = "convolutions"
    skips = False
    calls_parts = True

    runs: tuple[Run, ...]

    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Tensor:
        children, place = list(module.children()), 0
        for run in self.runs:
            for child in children[place : run.first]:
                x = child(x)
            place = run.stop
            conv: Any = children[run.conv]
            x = ops.conv3x3(
                x, conv.weight, conv.bias, activation="leaky_relu", negative_slope=run.negative_slope, upsample=run.upsample,
                pixel_shuffle=run.pixel_shuffle, backend=backend,
            )  # fmt: skip
        for child in children[place:]:
            x = child(x)
        return x

    def watched(self, module: nn.Module) -> list[nn.Module]:
        children = list(module.children())
        return [module, *(child for run in self.runs for child in children[run.first : run.stop])]

    def takes(self, module: nn.Module, x: Tensor) -> bool:
        same = len(module._modules) >= self.runs[-1].stop and part(module, self.convs[0]) is list(module.children())[self.runs[0].conv]
        return same and super().takes(module, x)


def is_doubling(layer: nn.Module) -> bool:
    """True for nearest upsampling by 2."""
    return type(layer) is nn.Upsample and layer.mode == "nearest" and layer.size is None and layer.scale_factor in (2, 2.0, (2.0, 2.0))


def is_plain_conv(layer: nn.Module) -> bool:
    """True for a plain 3x3 convolution that the operator computes."""
    if type(layer) is not nn.Conv2d:
        return False
    try:
        check_plain((), layer, 3)
    except Refused:
        return False
    return True


def _run_at(children: list[nn.Module], first: int) -> Run | None:
    """The run that begins with child `first`, if it holds more than a convolution."""
    k, upsample, slope, shuffle = first, 1, 1.0, 1
    if is_doubling(children[k]):
        k, upsample = k + 1, 2
    if k == len(children) or not is_plain_conv(children[k]):
        return None
    conv = k
    for layer in children[conv + 1 :]:
        if type(layer) is nn.ReLU and slope == 1.0:
            slope = 0.0
        elif type(layer) is nn.LeakyReLU and slope == 1.0 and layer.negative_slope >= 0:
            slope = layer.negative_slope
        elif type(layer) is nn.PixelShuffle and shuffle == 1:
            shuffle = layer.upscale_factor
        else:
            break
        k += 1
    stop = k + 1
    return Run(first, stop, conv, upsample, slope, shuffle) if stop - first > 1 else None


def match_convolutions(module: nn.Module) -> Candidate | None:
    """A Sequential's own forward, and a run or more among its children."""
    if type(module).forward is not nn.Sequential.forward:
        return None
    children, names, runs, k = list(module.children()), list(module._modules), [], 0
    while k < len(children):
        run = _run_at(children, k)
        if run is not None:
            runs.append(run)
        k = run.stop if run is not None else k + 1
    if not runs:
        return None
    for run in runs:
        for name, child in zip(names[run.first : run.stop], children[run.first : run.stop], strict=True):
            if has_hooks(child):
                raise Refused(f"{name} has hooks, which fusing would silence (old-style weight norm and spectral norm are hooks too)")
    whole = Convolutions(tuple((names[run.conv],) for run in runs), tuple(runs))
    first = runs[0]
    shifted = Run(0, first.stop - first.first, first.conv - first.first, first.upsample, first.negative_slope, first.pixel_shuffle)

    def hypotheses(probe: Probe) -> Iterator[Convolutions]:
        yield Convolutions(((str(shifted.conv),),), (shifted,))

    conv = children[first.conv]
    shape = (1, conv.in_channels, 5, 6)
    return Candidate(Convolutions.kind, shape, hypotheses, stand_in=nn.Sequential(*children[first.first : first.stop]), whole=whole)  # type: ignore[arg-type]
