"""RRDBNet in the dialect of BasicSR and Real-ESRGAN, whose names are also this package's own."""

from __future__ import annotations

from torch import Tensor

NAME = "basicsr"
ABOUT = "RRDBNet (BasicSR, Real-ESRGAN)"
EXPECTED = "conv_first, body.{i}.rdb{1-3}.conv{1-5}, conv_body, conv_up{1,2}, conv_hr, conv_last"


def matches(state: dict[str, Tensor]) -> bool:
    return {"conv_first.weight", "body.0.rdb1.conv1.weight"} <= state.keys()


def to_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def from_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state
