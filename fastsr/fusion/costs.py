"""What a block costs for each pixel, counted on fake tensors: nothing is computed or allocated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsr.fusion.report import Cost
from fastsr.memory.measuring import fake_model, track

#: Side of the picture on which a block is simulated; vectors of channels count for little beside it.
SIDE = 64

#: Operators that make a view, or memory that nobody reads; those of "prim" ask for a device or a size.
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "alias")


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that go into operators and come out of them; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace != "prim" and func.overloadpacket.__name__ not in _FREE:
            tensors = [t for t in tree_leaves([args, kwargs, result]) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def cost(module: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Of a block that takes images of `input_shape`'s channels."""
    shape, dtype = (1, input_shape[1], SIDE, SIDE), next(module.parameters()).dtype
    with fake_model(module, shape, dtype) as (fake, x), torch.no_grad():
        x = x.contiguous(memory_format=torch.channels_last)  # as between fused blocks
        with Traffic() as traffic:
            fake(x)
    with fake_model(module, shape, dtype) as (fake, x):
        memory = track(fake.requires_grad_(), x.contiguous(memory_format=torch.channels_last).requires_grad_())
    return Cost(memory.saved / SIDE**2, traffic.bytes / SIDE**2)
