"""What every family of networks shares: a network without memory gets a file's tensors, after all of them have been checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastsr.weights.errors import WeightsError, some

Network = TypeVar("Network", bound=nn.Module)


def filled(construct: Callable[[], Network], state: dict[str, Tensor], about: str) -> Network:
    """The network that `construct` makes, with the tensors of `state`.

    Args:
        construct: makes the network; called where tensors take no memory, so that the memory is that of the file.
        about: the network in words, for messages.

    Raises:
        WeightsError: tensors that are missing, surplus, ill-shaped, or of integers where the network has none.
    """
    with torch.device("meta"), _Uninitialised():
        model = construct()
    held = model.state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in held.items()}
    if missing := [key for key in expected if key not in state]:
        raise WeightsError(f"{about} lacks {some(missing)}")
    if surplus := [key for key in state if key not in expected]:
        raise WeightsError(f"{about} has no {some(surplus)}")
    for key, shape in expected.items():
        tensor = state[key]
        floating = held[key].is_floating_point()
        if tuple(tensor.shape) != shape or (not tensor.is_floating_point() if floating else tensor.dtype != held[key].dtype):
            wanted = "floating point" if floating else str(held[key].dtype)
            raise WeightsError(f"{key} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected {shape}, {wanted}")
    model.load_state_dict({key: state[key].detach() for key in expected}, assign=True)
    return model.requires_grad_(True)


def check_needed(state: dict[str, Tensor], keys: Iterable[str], about: str) -> None:
    """The tensors that sizes are read from are there, four-dimensional and not empty."""
    for key in keys:
        if key not in state:
            raise WeightsError(f"{about} lacks {key}")
        if state[key].dim() != 4 or 0 in state[key].shape:
            raise WeightsError(f"{key} has shape {tuple(state[key].shape)}; expected (O, C, 3, 3)")


def unshuffle_factor(first_in: int, num_out: int) -> int:
    """A first convolution with 4 or 16 times the result's channels reads a pixel-unshuffled image."""
    return {4 * num_out: 2, 16 * num_out: 4}.get(first_in, 1)


class _Uninitialised(TorchFunctionMode):
    """Random numbers for tensors without memory cost torch two seconds of imports; inside, they are left away."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func.__name__ in ("normal_", "uniform_", "zero_", "fill_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
