"""What a block costs for each pixel, counted on fake tensors: nothing is computed or allocated; and whether fusing it gains anything."""

from __future__ import annotations

import math
from typing import Any, Literal

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

#: What our operators go through a second time, by the names of their arguments: a gate needs the mean of all pixels first.
_TWICE = {
    "channel_attention": ("x",),
    "channel_attention_backward": ("grad",),
    "triton_channel_attention": ("x",),
    "triton_channel_attention_backward": ("grad",),
    "rcab": ("x", "hidden"),
    "triton_rcab": ("x", "hidden"),
}

#: Savings below this share of the bytes that the block's own code moves are none: those of vectors of channels come to half of it.
LEAST_GAIN = 0.002

#: What the report says of a block that could be fused and would gain nothing, and of one that gains in backward alone.
NO_GAIN = "no gain expected"
IN_TRAINING = "in training alone: no gain expected in inference"


class Traffic(TorchDispatchMode):
    """Counts the operators, and the bytes of the tensors that go into them and come out of them; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and func.namespace != "prim" and name not in _FREE:
            again = _TWICE.get(name, ()) if func.namespace == "fastsr" else ()
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            self.bytes += sum(_size(t) for t in tree_leaves([args, kwargs, result, [named[k] for k in again]]) if isinstance(t, Tensor))
            self.calls += 1
        return result


def _size(t: Tensor) -> int:
    """Bytes of the elements that lie in memory: those of an expanded dimension are one."""
    return math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride or not size) * t.element_size()


def cost(module: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Of a block that takes images of `input_shape`'s channels."""
    shape, dtype = (1, input_shape[1], SIDE, SIDE), next(module.parameters()).dtype
    with fake_model(module, shape, dtype) as (fake, x), torch.no_grad():
        x = x.contiguous(memory_format=torch.channels_last)  # as between fused blocks
        with Traffic() as traffic:
            fake(x)
    with fake_model(module, shape, dtype) as (fake, x):
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        with Traffic() as step:
            memory = track(fake.requires_grad_(), x)
    return Cost(memory.saved / SIDE**2, traffic.bytes / SIDE**2, step.bytes / SIDE**2, traffic.calls)


def predicted(own: nn.Module, fused: nn.Module, input_shape: tuple[int, ...]) -> tuple[Cost, ...]:
    """What a block costs with its own code and fused; nothing where that code cannot run on tensors without values."""
    try:
        return cost(own, input_shape), cost(fused, input_shape)
    except Exception:  # of other people's code, which the proof has run on values
        return ()


def gain(before: Cost, after: Cost, device: str) -> Literal["always", "in training", "never"]:
    """When fusing should gain something where the block costs `before` and fused `after`.

    A block that moves fewer bytes is faster, and one that keeps fewer leaner. On a GPU each operator is a launch, which costs microseconds
    however little it does; on a CPU it costs next to nothing.
    """
    least = LEAST_GAIN * before.moved
    if before.moved - after.moved > least or (device != "cpu" and after.calls < before.calls):
        return "always"
    return "in training" if max(before.stepped - after.stepped, before.saved - after.saved) > least else "never"
