"""A call's key: what has to agree for a recorded graph to stand in for it; and the static tensors that such a graph reads."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastsr import backends


class Unrecordable(Exception):
    """A call that no graph can stand in for; the message says why."""


class Call(NamedTuple):
    """Arguments as a list of tensors and a hashable rest."""

    tensors: list[Tensor]
    key: Hashable
    leaves: list[Any]  # all arguments, flat
    spec: Any

    def rebuilt(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with other tensors in place of the call's."""
        others = iter(tensors)
        return pytree.tree_unflatten([next(others) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self.spec)


def describe(args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device) -> Call:
    """The call with these arguments in the present modes.

    Raises:
        Unrecordable: an argument is on another device, sparse, of a class of its own, or has no hash.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    gradients = torch.is_grad_enabled()
    tensors: list[Tensor] = []
    parts: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if type(leaf) not in (Tensor, torch.nn.Parameter) or leaf.layout != torch.strided:
                raise Unrecordable(f"an argument is a {type(leaf).__name__} with layout {leaf.layout}; expected a plain tensor")
            if leaf.device != device:
                raise Unrecordable(f"an argument is on {leaf.device}, the model on {device}")
            if gradients and leaf._backward_hooks:
                raise Unrecordable("an argument has a tensor hook")
            tensors.append(leaf)
            parts.append((leaf.shape, leaf.stride(), leaf.dtype, gradients and leaf.requires_grad))
        else:
            try:
                hash(leaf)
            except TypeError:
                raise Unrecordable(f"an argument is a {type(leaf).__name__}, which has no hash") from None
            parts.append((type(leaf), leaf))
    return Call(tensors, (spec, tuple(parts), gradients, *modes(device)), leaves, spec)


def modes(device: torch.device) -> tuple[Hashable, ...]:
    """What else decides which kernels run: autocast, our default backend, torch's switches for precision and determinism."""
    kind = device.type
    precision = tuple(getattr(place, "fp32_precision", None) for place in (torch.backends.cudnn.conv, torch.backends.cuda.matmul))  # type: ignore[attr-defined]
    return (
        torch.get_autocast_dtype(kind) if backends.autocasts(kind) else None,
        backends.default_backend(),
        torch.are_deterministic_algorithms_enabled(),
        precision,
    )


def in_words(call: Call) -> str:
    """The call for a report: shapes and dtypes."""
    words = [f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in call.tensors]
    return ", ".join(words) or "no tensors"


def static_twin(t: Tensor, wants_grad: bool = False) -> Tensor:
    """A tensor of its own memory with t's values, and its strides if no two elements of t share a place."""
    with torch.inference_mode(False), torch.no_grad():
        twin = torch.empty_like(t.detach(), memory_format=torch.preserve_format)
        twin.copy_(t.detach())
    return twin.requires_grad_(wants_grad)


def fill(statics: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write the values of a call where its graph reads them."""
    with torch.no_grad():
        for static, value in zip(statics, values, strict=True):
            static.detach().copy_(value.detach(), non_blocking=True)


def flatten_outputs(answer: Any) -> tuple[list[Any], Any]:
    """Leaves and structure of what a model returned.

    Raises:
        Unrecordable: a leaf is neither a plain tensor nor a constant.
    """
    leaves, spec = pytree.tree_flatten(answer)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, int, float, bool, str, type(None))):
            raise Unrecordable(f"the model returned a {type(leaf).__name__}; expected tensors in tuples, lists and dicts")
        if isinstance(leaf, Tensor) and (type(leaf) not in (Tensor, torch.nn.Parameter) or leaf.layout != torch.strided):
            raise Unrecordable(f"the model returned a {type(leaf).__name__} with layout {leaf.layout}; expected plain tensors")
    return leaves, spec


def rebuild(leaves: Sequence[Any], spec: Any) -> Any:
    """The inverse of `flatten_outputs`."""
    return pytree.tree_unflatten(list(leaves), spec)
