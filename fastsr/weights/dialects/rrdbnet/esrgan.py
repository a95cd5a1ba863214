"""RRDBNet in the dialect of ESRGAN's later code, of BSRGAN and of RealSR."""

from __future__ import annotations

import re

from torch import Tensor

from fastsr.weights.dialects.dialect import Renaming, renamed

NAME = "esrgan"
ABOUT = "RRDBNet (ESRGAN, BSRGAN, RealSR)"
EXPECTED = "conv_first, RRDB_trunk.{i}.RDB{1-3}.conv{1-5}, trunk_conv, upconv{1,2}, HRconv, conv_last"

_NAMES: Renaming = (
    (re.compile(r"RRDB_trunk\.(\d+)\.RDB(\d)\."), r"body.\1.rdb\2."),
    (re.compile(r"trunk_conv\."), "conv_body."),
    (re.compile(r"upconv(\d)\."), r"conv_up\1."),
    (re.compile(r"HRconv\."), "conv_hr."),
)
_OWN_NAMES: Renaming = (
    (re.compile(r"body\.(\d+)\.rdb(\d)\."), r"RRDB_trunk.\1.RDB\2."),
    (re.compile(r"conv_body\."), "trunk_conv."),
    (re.compile(r"conv_up(\d)\."), r"upconv\1."),
    (re.compile(r"conv_hr\."), "HRconv."),
)


def matches(state: dict[str, Tensor]) -> bool:
    return {"conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight"} <= state.keys()


def to_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(state, _NAMES)


def from_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(state, _OWN_NAMES)
