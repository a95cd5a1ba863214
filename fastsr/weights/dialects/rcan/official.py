"""RCAN in the dialect of its authors' code, of EDSR-PyTorch and of traiNNer-redux; spandrel reads it.

    sub_mean, add_mean                    MeanShift: 1x1 convolutions on values 0..255; traiNNer-redux may leave them out
    head.0                                conv_first; head.1 after a pixel-unshuffle
    body.{g}.body.{b}.body.{0,2}          a block's convolutions; body.3.conv_du.{0,2} in it, its attention
    body.{g}.body.{blocks}                a group's convolution
    body.{groups}                         conv_after_body
    tail.0.{0,2,...}, tail.1              upsample and conv_last
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fastsr.models.rcan import DIV2K_MEAN
from fastsr.weights.dialects.dialect import Renaming, renamed

NAME = "rcan"
ABOUT = "RCAN (its authors' code, EDSR-PyTorch, traiNNer-redux)"
EXPECTED = "head.0, body.{g}.body.{b}.body.{0,2,3.conv_du.0,3.conv_du.2}, body.{g}.body.{blocks}, body.{groups}, tail.0.{0,2}, tail.1"

#: The range of values in every such network, as far as anyone can see.
RANGE = 255.0

_GROUP = re.compile(r"body\.(\d{1,6})\.body\.0\.body\.0\.weight")
_BLOCK = re.compile(r"body\.0\.body\.(\d{1,6})\.body\.0\.weight")
_OWN_GROUP = re.compile(r"body\.(\d+)\.conv\.weight")
_OWN_BLOCK = re.compile(r"body\.0\.residual_group\.(\d+)\.rcab\.0\.weight")


def matches(state: dict[str, Tensor]) -> bool:
    return {"body.0.body.0.body.0.weight", "body.0.body.0.body.3.conv_du.0.weight"} <= state.keys()


def to_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    groups, blocks = (sum(bool(pattern.fullmatch(key)) for key in state) for pattern in (_GROUP, _BLOCK))
    names: Renaming = (
        (re.compile(r"head\.[01]\."), "conv_first."),
        (re.compile(r"body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.0\."), r"body.\1.residual_group.\2.rcab.3.attention.1."),
        (re.compile(r"body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.2\."), r"body.\1.residual_group.\2.rcab.3.attention.3."),
        (re.compile(r"body\.(\d+)\.body\.(\d+)\.body\."), r"body.\1.residual_group.\2.rcab."),
        (re.compile(rf"body\.(\d+)\.body\.{blocks}\."), r"body.\1.conv."),
        (re.compile(rf"body\.{groups}\.(?=weight|bias)"), "conv_after_body."),
        (re.compile(r"tail\.0\."), "upsample."),
        (re.compile(r"tail\.1\."), "conv_last."),
    )
    return renamed(state, names)


def from_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    groups, blocks = (sum(bool(pattern.fullmatch(key)) for key in state) for pattern in (_OWN_GROUP, _OWN_BLOCK))
    unshuffled = state["conv_first.weight"].shape[1] != state["conv_last.weight"].shape[0]
    names: Renaming = (
        (re.compile(r"conv_first\."), f"head.{int(unshuffled)}."),
        (re.compile(r"body\.(\d+)\.residual_group\.(\d+)\.rcab\.3\.attention\.1\."), r"body.\1.body.\2.body.3.conv_du.0."),
        (re.compile(r"body\.(\d+)\.residual_group\.(\d+)\.rcab\.3\.attention\.3\."), r"body.\1.body.\2.body.3.conv_du.2."),
        (re.compile(r"body\.(\d+)\.residual_group\.(\d+)\.rcab\."), r"body.\1.body.\2.body."),
        (re.compile(r"body\.(\d+)\.conv\."), rf"body.\1.body.{blocks}."),
        (re.compile(r"conv_after_body\."), f"body.{groups}."),
        (re.compile(r"upsample\."), "tail.0."),
        (re.compile(r"conv_last\."), "tail.1."),
    )
    return renamed(state, names)


def values_inside(own: dict[str, Tensor]) -> dict[str, Any]:
    """What the constructor must be told about range and mean.

    A MeanShift is taken as it is; where it subtracts the mean of DIV2K of values 0..1, the network was trained on those.
    """
    if "sub_mean.weight" not in own:
        return {"img_range": 1.0, "rgb_mean": (0.0,)}
    weight, bias = own["sub_mean.weight"], own.get("sub_mean.bias")
    small = (
        bias is not None
        and tuple(weight.shape) == (3, 3, 1, 1)
        and tuple(bias.shape) == (3,)
        and torch.equal(weight.float().flatten(1), torch.eye(3))
        and bool((bias.float() + torch.tensor(DIV2K_MEAN)).abs().max() < 0.01)
    )
    return {"img_range": 1.0 if small else RANGE, "mean_shift": True}
