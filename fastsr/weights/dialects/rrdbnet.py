"""The network that a state dict in this package's own names is for: its sizes from the tensors' shapes."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastsr.models import RRDBNet
from fastsr.weights.errors import WeightsError, some

_BLOCK = re.compile(r"body\.(\d{1,6})\.rdb1\.conv1\.weight")

_NEEDED = ("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_last.weight")


def build(state: dict[str, Tensor]) -> RRDBNet:
    """The network with the sizes that the tensors have; missing, surplus and ill-shaped tensors are errors."""
    for key in _NEEDED:
        if key not in state:
            raise WeightsError(f"an RRDBNet lacks {key}")
        if state[key].dim() != 4 or 0 in state[key].shape:
            raise WeightsError(f"{key} has shape {tuple(state[key].shape)}; expected (O, C, 3, 3)")
    feat, first_in = state["conv_first.weight"].shape[:2]
    num_out = state["conv_last.weight"].shape[0]
    grow = state["body.0.rdb1.conv1.weight"].shape[0]
    blocks = sum(bool(_BLOCK.fullmatch(key)) for key in state)
    plus = "body.0.rdb1.conv1x1.weight" in state
    unshuffle = _unshuffle(first_in, num_out)
    scale = _scale(state, unshuffle)
    _check_sizes(state, feat, grow)
    with torch.device("meta"), _Uninitialised():  # sizes alone: memory is that of the file
        model = RRDBNet(first_in // unshuffle**2, num_out, scale, feat, blocks, grow, unshuffle=unshuffle, plus=plus)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if missing := [key for key in expected if key not in state]:
        raise WeightsError(f"an RRDBNet with {blocks} blocks lacks {some(missing)}")
    if surplus := [key for key in state if key not in expected]:
        raise WeightsError(f"an RRDBNet with {blocks} blocks has no {some(surplus)}")
    for key, shape in expected.items():
        tensor = state[key]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise WeightsError(f"{key} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected {shape}, floating point")
    model.load_state_dict({key: state[key].detach() for key in expected}, assign=True)
    return model.requires_grad_(True)


class _Uninitialised(TorchFunctionMode):
    """Random numbers for tensors without memory cost torch two seconds of imports; inside, they are left away."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func.__name__ in ("normal_", "uniform_", "zero_", "fill_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _check_sizes(state: dict[str, Tensor], feat: int, grow: int) -> None:
    """Before a network is built: its largest layer is in the file."""
    key = "body.0.rdb1.conv5.weight"
    tensor = state.get(key)
    if tensor is None or tuple(tensor.shape) != (feat, feat + 4 * grow, 3, 3):
        found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise WeightsError(f"{key} is {found}; expected {(feat, feat + 4 * grow, 3, 3)} for {feat} features and growth {grow}")


def _unshuffle(first_in: int, num_out: int) -> int:
    """A first convolution with 4 or 16 times the result's channels reads a pixel-unshuffled image."""
    return {4 * num_out: 2, 16 * num_out: 4}.get(first_in, 1)


def _scale(state: dict[str, Tensor], unshuffle: int) -> int:
    """Two for each x2 step, less what the unshuffle takes."""
    steps = 0
    while f"conv_up{steps + 1}.weight" in state:
        steps += 1
    if not unshuffle <= 2**steps <= 16 * unshuffle:
        raise WeightsError(f"{steps} x2 steps after a pixel-unshuffle by {unshuffle}; expected a scale of 1, 2, 4, 8 or 16")
    return 2**steps // unshuffle
