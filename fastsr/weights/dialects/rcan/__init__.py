"""RCAN: its dialects, and the sizes that a state dict in this package's own names is for."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from fastsr.models import RCAN
from fastsr.models.rcan import STEPS
from fastsr.weights.dialects.dialect import Dialect
from fastsr.weights.dialects.filling import check_needed, filled, unshuffle_factor
from fastsr.weights.dialects.rcan import basicsr, official
from fastsr.weights.errors import WeightsError

NETWORK = RCAN
DIALECTS: tuple[Dialect, ...] = (basicsr, official)

_FIRST = "body.0.residual_group.0.rcab."
_GROUP = re.compile(r"body\.\d{1,6}\.conv\.weight")
_BLOCK = re.compile(r"body\.(\d{1,6})\.residual_group\.\d{1,6}\.rcab\.0\.weight")
_MEAN_SHIFT = ("sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias")


def build(state: dict[str, Tensor], dialect: Dialect) -> RCAN:
    """The network with the sizes that the tensors have; missing, surplus and ill-shaped tensors are errors."""
    squeeze = f"{_FIRST}3.attention.1.weight"
    check_needed(state, ("conv_first.weight", f"{_FIRST}0.weight", squeeze, "conv_last.weight"), "an RCAN")
    feat, first_in = state["conv_first.weight"].shape[:2]
    num_out = state["conv_last.weight"].shape[0]
    groups, blocks = _depth(state)
    squeeze_factor = _squeeze_factor(squeeze, state[squeeze].shape[0], feat)
    if tuple(state[f"{_FIRST}0.weight"].shape) != (feat, feat, 3, 3):
        shape = tuple(state[f"{_FIRST}0.weight"].shape)
        raise WeightsError(f"{_FIRST}0.weight has shape {shape}; expected {(feat, feat, 3, 3)} for {feat} features")
    unshuffle = unshuffle_factor(first_in, num_out)
    channels = first_in // unshuffle**2
    upscale = _upscale(state, feat, unshuffle)
    options: dict[str, Any] = official.values_inside(state) if dialect is official else {}
    if channels != 3 or num_out != 3:
        options["rgb_mean"] = (0.0,)  # that of DIV2K is for colours
    if options.get("mean_shift") and channels != num_out:
        raise WeightsError(f"{channels} channels of the image and {num_out} of the result; expected as many, with sub_mean and add_mean")
    model = filled(
        lambda: RCAN(channels, num_out, feat, groups, blocks, squeeze_factor, upscale, unshuffle=unshuffle, **options),
        state,
        f"an RCAN with {groups} groups of {blocks} blocks",
    )
    if model.mean_shift:
        model.sub_mean.requires_grad_(False)
        model.add_mean.requires_grad_(False)
    return model


def express(model: RCAN, dialect: Dialect) -> dict[str, Tensor]:
    """The network's state dict in a dialect.

    Raises:
        ValueError: the dialect cannot express the network.
    """
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    plain = {key: state.pop(key) for key in _MEAN_SHIFT if key in state}
    if dialect is official:
        if model.res_scale != 1:
            raise ValueError(f"save: dialect is {dialect.NAME!r}, whose networks have no res_scale; this one's is {model.res_scale:g}")
        return _mean_shift(model, plain) | dialect.from_own(state)
    for key, expected in _plain_mean_shift(model).items() if plain else ():
        if not torch.equal(plain[key].cpu(), expected.to(plain[key].dtype)):
            raise ValueError(f"save: dialect is {dialect.NAME!r}, whose files have no {key}, and this one is no plain mean")
    return dialect.from_own(state)


def _mean_shift(model: RCAN, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers that a file in the official dialect has for range and mean, none where there is nothing to shift."""
    if held and official.values_inside(held)["img_range"] == model.img_range:
        return held
    if not held and model.img_range == 1 and not any(model.rgb_mean):
        return {}
    layers, factor = held or _plain_mean_shift(model), model.img_range / official.RANGE
    factors = dict(zip(_MEAN_SHIFT, (factor, 1.0, 1 / factor, 1 / factor), strict=True))
    return {key: tensor * factors[key] for key, tensor in layers.items()}


def _plain_mean_shift(model: RCAN) -> dict[str, Tensor]:
    """The layers that do what `rgb_mean` and `img_range` do."""
    eye, channels = torch.eye(model.num_in_ch)[:, :, None, None], model.num_in_ch
    offset = model.img_range * torch.tensor(model.rgb_mean).expand(channels)
    return dict(zip(_MEAN_SHIFT, (eye, -offset, eye, offset), strict=True))


def _depth(state: dict[str, Tensor]) -> tuple[int, int]:
    """Groups, and blocks in each; as many as there are in the file, before anything of that number is built."""
    groups = sum(bool(_GROUP.fullmatch(key)) for key in state)
    owners = [found[1] for key in state if (found := _BLOCK.fullmatch(key))]
    blocks = owners.count("0")
    if groups * blocks != len(owners):
        raise WeightsError(f"{groups} groups and {blocks} blocks in the first, but {len(owners)} blocks in all; expected as many in each")
    return groups, blocks


def _squeeze_factor(key: str, squeezed: int, feat: int) -> int:
    factor = max(1, feat // squeezed)
    if feat // factor != squeezed:
        raise WeightsError(f"{key} squeezes {feat} features to {squeezed}; expected {feat} over a whole number, rounded down")
    return factor


def _upscale(state: dict[str, Tensor], feat: int, unshuffle: int) -> int:
    """From the channels that each PixelShuffle step takes, less what the unshuffle takes."""
    steps: tuple[int, ...] = ()
    while (tensor := state.get(f"upsample.{2 * len(steps)}.weight")) is not None:
        outputs = tensor.shape[0] if tensor.dim() else 0
        steps += (math.isqrt(outputs // feat),)
    scale = math.prod(steps)
    if STEPS.get(scale) != steps or scale % unshuffle or scale // unshuffle not in STEPS:
        found = f"PixelShuffle steps by {', '.join(map(str, steps)) or 'nothing'} after a pixel-unshuffle by {unshuffle}"
        raise WeightsError(f"{found}; expected a scale of {', '.join(map(str, STEPS))}")
    return scale // unshuffle
