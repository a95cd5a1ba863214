"""Floating-point operations of one operator call: what recomputation costs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def flops_of(func: Any, args: Any, result: Any) -> int:
    """Two for each multiply-add of convolutions and matrix products; one for each element that another operator writes."""
    name = func.name()
    if name.startswith("fastsr::"):
        return _fused(name, args)
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return int(formula(*args, out_val=result))
    if func.is_view:
        return 0
    return sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))


def _fused(name: str, args: Any) -> int:
    """Every 3x3 weight among the arguments meets every pixel of the convolution once; in backward twice (data and weight)."""
    tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    image = tensors[0]  # by this package's schemas the picture that the convolutions read, or the gradient
    pixels = image.shape[0] * image.shape[2:].numel() if image.dim() == 4 else 0
    weights = sum(t.numel() for t in tensors[1:] if t.dim() == 4 and t.shape[2:] == (3, 3) and t.shape != image.shape)
    if name == "fastsr::conv3x3":
        pixels *= args[7] ** 2  # `upsample`
    return 2 * pixels * weights
