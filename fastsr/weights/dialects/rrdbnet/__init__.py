"""RRDBNet: its dialects, and the sizes that a state dict in this package's own names is for."""

from __future__ import annotations

import re

from torch import Tensor

from fastsr.models import RRDBNet
from fastsr.weights.dialects.dialect import Dialect
from fastsr.weights.dialects.filling import check_needed, filled, unshuffle_factor
from fastsr.weights.dialects.rrdbnet import basicsr, esrgan, esrgan_old
from fastsr.weights.errors import WeightsError

NETWORK = RRDBNet
DIALECTS: tuple[Dialect, ...] = (basicsr, esrgan, esrgan_old)

_BLOCK = re.compile(r"body\.(\d{1,6})\.rdb1\.conv1\.weight")


def build(state: dict[str, Tensor], dialect: Dialect) -> RRDBNet:
    """The network with the sizes that the tensors have; missing, surplus and ill-shaped tensors are errors."""
    check_needed(state, ("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_last.weight"), "an RRDBNet")
    feat, first_in = state["conv_first.weight"].shape[:2]
    num_out = state["conv_last.weight"].shape[0]
    grow = state["body.0.rdb1.conv1.weight"].shape[0]
    blocks = sum(bool(_BLOCK.fullmatch(key)) for key in state)
    plus = "body.0.rdb1.conv1x1.weight" in state
    unshuffle = unshuffle_factor(first_in, num_out)
    scale = _scale(state, unshuffle)
    _check_sizes(state, feat, grow)
    return filled(
        lambda: RRDBNet(first_in // unshuffle**2, num_out, scale, feat, blocks, grow, unshuffle=unshuffle, plus=plus),
        state,
        f"an RRDBNet with {blocks} blocks",
    )


def express(model: RRDBNet, dialect: Dialect) -> dict[str, Tensor]:
    """The network's state dict in a dialect.

    Raises:
        ValueError: the dialect cannot express the network.
    """
    if model.plus and dialect is not esrgan_old:
        # other programs leave its conv1x1 out, and say nothing
        raise ValueError(f"save: dialect is {dialect.NAME!r}, but an ESRGAN+ network (plus=True) has files in {esrgan_old.NAME!r} alone")
    return dialect.from_own({key: tensor.detach() for key, tensor in model.state_dict().items()})


def _check_sizes(state: dict[str, Tensor], feat: int, grow: int) -> None:
    """Before a network is built: its largest layer is in the file."""
    key = "body.0.rdb1.conv5.weight"
    tensor = state.get(key)
    if tensor is None or tuple(tensor.shape) != (feat, feat + 4 * grow, 3, 3):
        found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise WeightsError(f"{key} is {found}; expected {(feat, feat + 4 * grow, 3, 3)} for {feat} features and growth {grow}")


def _scale(state: dict[str, Tensor], unshuffle: int) -> int:
    """Two for each x2 step, less what the unshuffle takes."""
    steps = 0
    while f"conv_up{steps + 1}.weight" in state:
        steps += 1
    if not unshuffle <= 2**steps <= 16 * unshuffle:
        raise WeightsError(f"{steps} x2 steps after a pixel-unshuffle by {unshuffle}; expected a scale of 1, 2, 4, 8 or 16")
    return 2**steps // unshuffle
