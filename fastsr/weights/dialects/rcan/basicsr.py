"""RCAN in the dialect of BasicSR, whose names are also this package's own. Range and mean of the values are not in the file."""

from __future__ import annotations

from torch import Tensor

NAME = "basicsr"
ABOUT = "RCAN (BasicSR)"
EXPECTED = (
    "conv_first, body.{g}.residual_group.{b}.rcab.{0,2,3.attention.1,3.attention.3}, body.{g}.conv, conv_after_body, "
    "upsample.{0,2}, conv_last"
)


def matches(state: dict[str, Tensor]) -> bool:
    return {"conv_first.weight", "body.0.residual_group.0.rcab.0.weight"} <= state.keys()


def to_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def from_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state
