"""RRDBNet in the dialect of BasicSR and Real-ESRGAN, whose names are also this package's own."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastsr.models import RRDBNet
from fastsr.weights.errors import WeightsError, some

NAME = "RRDBNet (BasicSR, Real-ESRGAN)"
EXPECTED = "conv_first, body.{i}.rdb{1-3}.conv{1-5}, conv_body, conv_up{1,2}, conv_hr, conv_last"

_BLOCK = re.compile(r"body\.(\d{1,6})\.rdb1\.conv1\.weight")


def matches(state: dict[str, Tensor]) -> bool:
    return {"conv_first.weight", "body.0.rdb1.conv1.weight", "conv_last.weight"} <= state.keys()


def build(state: dict[str, Tensor]) -> RRDBNet:
    """The network with the sizes that the tensors have; missing, surplus and ill-shaped tensors are errors."""
    for key in ("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_last.weight"):
        if state[key].dim() != 4 or 0 in state[key].shape:
            raise WeightsError(f"{key} has shape {tuple(state[key].shape)}; expected (O, C, 3, 3)")
    feat, first_in = state["conv_first.weight"].shape[:2]
    num_out = state["conv_last.weight"].shape[0]
    grow = state["body.0.rdb1.conv1.weight"].shape[0]
    blocks = sum(bool(_BLOCK.fullmatch(key)) for key in state)
    scale, num_in = _scale(state, first_in, num_out)
    _check_sizes(state, feat, grow)
    with torch.device("meta"):  # sizes alone: memory is that of the file
        model = RRDBNet(num_in, num_out, scale, feat, blocks, grow)
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


def _check_sizes(state: dict[str, Tensor], feat: int, grow: int) -> None:
    """Before a network is built: its largest layer is in the file."""
    key = "body.0.rdb1.conv5.weight"
    tensor = state.get(key)
    if tensor is None or tuple(tensor.shape) != (feat, feat + 4 * grow, 3, 3):
        found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise WeightsError(f"{key} is {found}; expected {(feat, feat + 4 * grow, 3, 3)} for {feat} features and growth {grow}")


def _scale(state: dict[str, Tensor], first_in: int, num_out: int) -> tuple[int, int]:
    """The scale and the image's channels: more x2 steps, or a first convolution that reads an unshuffled image."""
    if "conv_up4.weight" in state:
        return 16, first_in
    if "conv_up3.weight" in state:
        return 8, first_in
    if first_in == 4 * num_out:
        return 2, num_out
    if first_in == 16 * num_out:
        return 1, num_out
    return 4, first_in
