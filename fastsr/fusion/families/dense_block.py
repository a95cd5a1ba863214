"""Residual dense blocks, and the RRDBs made of them: ESRGAN, Real-ESRGAN, BSRGAN, MM-RealSR and their like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastsr import ops
from fastsr.backends import Backend
from fastsr.fusion.families.family import Candidate, Fusion, Probe, channels_grow, fitted, slopes
from fastsr.fusion.structure import Path, Refused, check_plain, has_hooks, owners, part


@dataclass(frozen=True)
class DenseBlock(Fusion):
    """`fastsr.ops.dense_block`; `run` takes its outer skip too."""

    kind = "residual dense block"
    flag = True

    negative_slope: float
    res_scale: float

    def run(self, module: nn.Module, x: Tensor, backend: Backend, residual: Tensor | None = None, residual_scale: float = 1.0) -> Tensor:
        weights, biases = self.parameters(module)
        options = {"save": getattr(module, "save", "all"), "backend": backend}
        return ops.dense_block(x, weights, biases, self.negative_slope, self.res_scale, residual, residual_scale, **options)  # type: ignore[arg-type]


def match_dense_block(module: nn.Module) -> Candidate | None:
    """Three 3x3 convolutions or more, at any depth, each of which reads the outputs of all before it."""
    parts = owners(module)
    convs = sorted(((p, m) for p, m in parts if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)), key=lambda c: c[1].in_channels)
    if len(convs) < 3 or not channels_grow([m for _, m in convs]):
        return None
    for path, m in parts:
        if not isinstance(m, nn.Conv2d) or m.kernel_size != (3, 3):
            name = ".".join(path) or "the block itself"
            raise Refused(f"{name} ({type(m).__name__}) has parameters or buffers that a residual dense block does not know")
    for path, m in convs:
        check_plain(path, m, 3)
    paths = tuple(path for path, _ in convs)

    def hypotheses(probe: Probe) -> Iterator[DenseBlock]:
        for slope in slopes(module):
            branch = DenseBlock(paths, slope, 1.0).run(probe.module, probe.x, "reference") - probe.x
            for scale in fitted(branch, probe.y - probe.x):
                yield DenseBlock(paths, slope, scale)

    return Candidate(DenseBlock.kind, (1, convs[0][1].in_channels, 5, 6), hypotheses)


@dataclass(frozen=True)
class RRDB(Fusion):
    """A chain of fused dense blocks with a skip around it, which the last of them adds. All blocks but the last are called as before."""

    kind = "RRDB"
    calls_parts = True

    blocks: tuple[str, ...]
    residual_scale: float

    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Tensor:
        y = x
        for name in self.blocks[:-1]:
            y = getattr(module, name)(y)
        last = getattr(module, self.blocks[-1])
        forward: Any = last.__dict__.get("forward")
        if forward is not None and isinstance(getattr(forward, "fusion", None), DenseBlock) and forward.applies(y):
            return forward.fusion.run(last, y, backend, x, self.residual_scale)
        return last(y) * self.residual_scale + x

    def watched(self, module: nn.Module) -> list[nn.Module]:
        return [module]

    def takes(self, module: nn.Module, x: Tensor) -> bool:
        if tuple(module._modules) != self.blocks:
            return False
        last = getattr(module, self.blocks[-1])
        fusion = getattr(last.__dict__.get("forward"), "fusion", None)
        return isinstance(fusion, DenseBlock) and not has_hooks(last) and fusion.takes(last, x)


def match_rrdb(module: nn.Module) -> Candidate | None:
    """Two dense blocks or more, fused before, and nothing else."""
    children = dict(module.named_children())
    forwards = [child.__dict__.get("forward") for child in children.values()]
    fusions = [getattr(forward, "fusion", None) for forward in forwards]
    if len(children) < 2 or not all(isinstance(fusion, DenseBlock) for fusion in fusions):
        return None
    if type(module).forward is nn.Sequential.forward or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return None
    if any(p is not None for p in (*module._parameters.values(), *module._buffers.values())):
        raise Refused(f"it has parameters or buffers of its own beside its {len(children)} dense blocks")
    names = tuple(children)
    convs: tuple[Path, ...] = tuple((name, *path) for name, fusion in zip(names, fusions, strict=True) for path in fusion.convs)  # type: ignore[union-attr]

    def hypotheses(probe: Probe) -> Iterator[RRDB]:
        branch = probe.x
        for name, fusion in zip(names, fusions, strict=True):
            branch = fusion.run(getattr(probe.module, name), branch, "reference")  # type: ignore[union-attr]
        for scale in fitted(branch, probe.y - probe.x):
            yield RRDB(convs, names, scale)

    features = part(module, convs[0]).in_channels
    return Candidate(RRDB.kind, (1, features, 5, 6), hypotheses)
