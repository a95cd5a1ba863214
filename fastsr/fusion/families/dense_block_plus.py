"""The residual dense block of ESRGAN+: two further skips inside, and in some versions noise while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import Backend
from fastsr.fusion.families.family import Candidate, Fusion, Probe, channels_grow, fitted, slopes
from fastsr.fusion.structure import Path, Refused, check_plain, owners, part
from fastsr.nn import needs_grad
from fastsr.nn.module import empty_buffer


@dataclass(frozen=True)
class DenseBlockPlus(Fusion):
    """`fastsr.nn.ResidualDenseBlockPlus`'s mathematics, each convolution with its activation and skip as one `fastsr.ops.conv3x3`.

    `convs` are the five convolutions and the pointwise one; `noise` is called on the result, as before. For inference alone: with gradients
    the skips inside cost the passes that the activations save, and the block's own code was measured to be faster.
    """

    kind = "residual dense block of ESRGAN+"

    negative_slope: float
    res_scale: float
    noise: Path | None

    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Tensor:
        (*weights, pointwise), (*biases, pointwise_bias) = self.parameters(module)
        grown, kept, options = [x], needs_grad(module, x), {"backend": backend}
        if kept:
            seen: Any = lambda: torch.cat(grown, 1)  # noqa: E731
        else:  # each convolution reads a prefix of the channels and writes those that follow
            workspace = empty_buffer(x, x.shape[1] + sum(w.shape[0] for w in weights[:-1]))
            workspace[:, : x.shape[1]] = x
            seen = lambda: workspace[:, : sum(g.shape[1] for g in grown)]  # noqa: E731
        for k, (weight, bias) in enumerate(zip(weights[:-1], biases, strict=False), 1):
            residual = F.conv2d(x, pointwise, pointwise_bias) if k == 2 else grown[2] if k == 4 else None
            read = seen()
            out = None if kept else workspace[:, read.shape[1] : read.shape[1] + weight.shape[0]]
            own: dict[str, Any] = {"negative_slope": self.negative_slope, "residual": residual, "out": out, **options}
            grown.append(ops.conv3x3(read, weight, bias, activation="leaky_relu", **own))
        y = ops.conv3x3(seen(), weights[-1], biases[-1], scale=self.res_scale, residual=x, **options)  # type: ignore[arg-type]
        return y if self.noise is None else part(module, self.noise)(y)

    def takes(self, module: nn.Module, x: Tensor) -> bool:
        return not needs_grad(module, x) and super().takes(module, x)

    def watched(self, module: nn.Module) -> list[nn.Module]:
        noise = None if self.noise is None else part(module, self.noise)
        return [m for m in module.modules() if m is not noise]


def match_dense_block_plus(module: nn.Module) -> Candidate | None:
    """Five 3x3 convolutions that grow, a pointwise one from the input to a growth, and at most one part without parameters, the noise."""
    parts = owners(module)
    convs = sorted(((p, m) for p, m in parts if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)), key=lambda c: c[1].in_channels)
    points = [(p, m) for p, m in parts if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    others = [(p, m) for p, m in parts if not isinstance(m, nn.Conv2d)]
    if len(convs) != 5 or len(points) != 1 or not channels_grow([m for _, m in convs]):
        return None
    growths = {m.out_channels for _, m in convs[:-1]}
    if len(growths) > 1 or (points[0][1].in_channels, points[0][1].out_channels) != (convs[0][1].in_channels, *growths):
        return None
    for path, m in (*convs, *points):
        check_plain(path, m, m.kernel_size[0])
    noise = [tuple(name.split(".")) for name, m in module.named_modules() if name and _is_noise(m)]
    if len(noise) > 1 or any(path not in noise for path, _ in others):
        raise Refused(
            f"{'.'.join(others[-1][0]) or 'the block itself'} has parameters or buffers that a {DenseBlockPlus.kind} does not know"
        )
    paths = tuple(path for path, _ in (*convs, *points))

    def hypotheses(probe: Probe) -> Iterator[DenseBlockPlus]:
        for slope in slopes(module):
            branch = DenseBlockPlus(paths, slope, 1.0, None).run(probe.module, probe.x, "reference") - probe.x
            for scale in fitted(branch, probe.y - probe.x):
                yield DenseBlockPlus(paths, slope, scale, noise[0] if noise else None)

    return Candidate(DenseBlockPlus.kind, (1, convs[0][1].in_channels, 5, 6), hypotheses, draws=bool(noise))


def _is_noise(m: nn.Module) -> bool:
    """A leaf without parameters that is none of torch's own layers."""
    return not list(m.children()) and not list(m.parameters()) and not type(m).__module__.startswith("torch.nn.")
