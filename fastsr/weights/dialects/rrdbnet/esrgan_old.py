"""RRDBNet in the dialect of ESRGAN's first code, a numbered sequence of layers; ESRGAN+ kept it and added `conv1x1`.

    model.0                  conv_first
    model.1.sub.{i}.RDB{j}   the dense blocks; conv{k}.0 in them, and conv1x1
    model.1.sub.{blocks}     conv_body
    model.{3, 6, ...}        conv_up1, conv_up2, ...: the convolutions after each x2 step, whose layers are three
    model.{n}, model.{n+2}   conv_hr and conv_last
"""

from __future__ import annotations

import re

from torch import Tensor

from fastsr.weights.errors import WeightsError, some

NAME = "esrgan-old"
ABOUT = "RRDBNet (first ESRGAN, ESRGAN+)"
EXPECTED = "model.0, model.1.sub.{i}.RDB{1-3}.conv{1-5}.0, model.1.sub.{blocks}, model.{3,6,8,10}"

_LAYER = re.compile(r"model\.(\d{1,4})\.(weight|bias)")
_BLOCK = re.compile(r"model\.1\.sub\.(\d{1,6})\.RDB([123])\.(?:(conv[1-5])\.0|(conv1x1))\.(weight|bias)")
_OWN_BLOCK = re.compile(r"body\.(\d+)\.rdb(\d)\.(conv\d)\.(weight|bias)")


def matches(state: dict[str, Tensor]) -> bool:
    return {"model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"} <= state.keys()


def to_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = sorted({int(found[1]) for key in state if (found := _LAYER.fullmatch(key))})
    blocks = 1 + max(int(found[1]) for key in state if (found := _BLOCK.fullmatch(key)))
    steps = len(layers) - 3
    expected = _layers(max(steps, 0))
    if layers != list(expected):
        found_layers = some(map(str, layers))
        raise WeightsError(f"the layers model.{{{found_layers}}} are no RRDBNet's; expected for instance model.{{0, 3, 6, 8, 10}}")
    own = {}
    for key, tensor in state.items():
        if found := _BLOCK.fullmatch(key):
            block, dense, conv, plus, part = found.groups()
            key = f"body.{block}.rdb{dense}.{conv or plus}.{part}"
        elif found := _LAYER.fullmatch(key):
            key = f"{expected[int(found[1])]}.{found[2]}"
        elif key.startswith(f"model.1.sub.{blocks}."):
            key = "conv_body." + key.removeprefix(f"model.1.sub.{blocks}.")
        own[key] = tensor
    return own


def from_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    blocks = 1 + max(int(found[1]) for key in state if (found := _OWN_BLOCK.fullmatch(key)))
    steps = sum(key.startswith("conv_up") and key.endswith(".weight") for key in state)
    numbers = {name: f"model.{layer}" for layer, name in _layers(steps).items()} | {"conv_body": f"model.1.sub.{blocks}"}
    renamed = {}
    for key, tensor in state.items():
        if key.startswith("body."):
            _, block, dense, conv, part = key.split(".")
            renamed[f"model.1.sub.{block}.RDB{dense[-1]}.{conv}{'' if conv == 'conv1x1' else '.0'}.{part}"] = tensor
        else:
            layer, part = key.split(".")
            renamed[f"{numbers[layer]}.{part}"] = tensor
    return renamed


def _layers(steps: int) -> dict[int, str]:
    """The numbered layers that have parameters, in their order, with this package's names."""
    ups = {3 * k: f"conv_up{k}" for k in range(1, steps + 1)}
    return {0: "conv_first", **ups, 3 * steps + 2: "conv_hr", 3 * steps + 4: "conv_last"}
