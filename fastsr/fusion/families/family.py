"""What the families of blocks share: the fused computation of a block, and the ways to find its numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr.backends import FUSED_DTYPES, Backend
from fastsr.fusion.structure import Path, part
from fastsr.nn.module import compute_dtype


@dataclass(frozen=True)
class Fusion(ABC):
    """How a block is computed by our operators: where its parameters stand, and the numbers that its code holds.

    It holds no tensor: those are read from the block's parts in each call, so that updates, casts, moves and sharding are seen.

    Attributes:
        convs: the parts that hold the parameters.
    """

    kind: ClassVar[str]
    flag: ClassVar[bool] = False  #: the operator can keep the input alone: the block gets the attribute `save` of `fastsr.memory`
    skips: ClassVar[bool] = True  #: the input is added to the result
    calls_parts: ClassVar[bool] = False  #: blocks inside are still called, and may be fused themselves

    convs: tuple[Path, ...]

    @abstractmethod
    def run(self, module: nn.Module, x: Tensor, backend: Backend) -> Any:
        """The block's output."""

    def watched(self, module: nn.Module) -> list[nn.Module]:
        """The block and the parts that are not called any more."""
        return list(module.modules())

    def takes(self, module: nn.Module, x: Tensor) -> bool:
        """True if the operators compute what the block would, in the dtype that it would; else the block's own forward runs."""
        weight = part(module, self.convs[0]).weight
        if x.dtype not in FUSED_DTYPES or x.dim() != 4 or x.device != weight.device:
            return False
        dtype = compute_dtype(x)
        if dtype != x.dtype:  # autocast; a skip in a wider dtype would be narrowed
            return not self.skips and weight.dtype in FUSED_DTYPES
        return weight.dtype == x.dtype or (weight.dtype in FUSED_DTYPES and torch.is_autocast_enabled(x.device.type))

    def parameters(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and biases of the parts."""
        parts = [part(module, path) for path in self.convs]
        return [p.weight for p in parts], [p.bias for p in parts]


@dataclass(frozen=True)
class Probe:
    """A float64 copy of a block with random parameters, an input, and what its own code makes of it."""

    module: nn.Module
    x: Tensor
    y: Any


@dataclass(frozen=True)
class Candidate:
    """A block that looks like one of a family: `hypotheses` yields what it may compute, to be proven.

    Attributes:
        moves: training changes its buffers.
        sure: False where other things have such parts too; what then cannot run on an image is none.
        draws: training draws random numbers, in a part that the fusion calls at the same time: equal under the same seed.
        stand_in: what is proven instead of a block that calls other blocks, which may be large; `whole` is then the block's fusion.
    """

    kind: str
    input_shape: tuple[int, ...]
    hypotheses: Callable[[Probe], Iterator[Fusion]]
    moves: bool = False
    stand_in: nn.Module | None = None
    whole: Fusion | None = None
    draws: bool = False
    sure: bool = True


def fitted(branch: Tensor, target: Tensor) -> list[float]:
    """The factors s that may stand in a block's code, from target = s * branch in float64: rounded as people write it, and as it is."""
    s = (branch * target).sum().item() / max((branch * branch).sum().item(), torch.finfo(torch.float64).tiny)
    return [float(f"{s:.6g}"), s]


def slopes(module: nn.Module) -> list[float]:
    """The negative slopes of the activations inside, as modules; without any the usual ones of code that calls functions."""
    found = {m.negative_slope for m in module.modules() if isinstance(m, nn.LeakyReLU)}
    if any(isinstance(m, nn.ReLU) for m in module.modules()):
        found.add(0.0)
    return [s for s in sorted(found) if s >= 0] or [0.2, 0.0, 0.1, 0.01]


#: Activations that stand between convolutions and are not part of an operator.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


def channels_grow(convs: Sequence[nn.Conv2d]) -> bool:
    """True if each convolution, sorted by inputs, reads all that those before it read and wrote; the last ends where the first began."""
    grown = convs[0].in_channels
    for conv in convs:
        if conv.in_channels != grown:
            return False
        grown += conv.out_channels
    return convs[-1].out_channels == convs[0].in_channels
