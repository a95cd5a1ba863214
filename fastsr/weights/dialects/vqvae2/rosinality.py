"""VQ-VAE-2 in the dialect of rosinality's vq-vae-2-pytorch, whose codebooks are (D, K)."""

from __future__ import annotations

import re

from torch import Tensor

from fastsr.nn.quantizer_states import FORMATS
from fastsr.weights.dialects.dialect import Renaming, renamed

NAME = "rosinality"
ABOUT = "VQ-VAE-2 (rosinality)"
EXPECTED = "enc_{b,t}.blocks.{i}, quantize_conv_{b,t}, quantize_{b,t}.{embed,cluster_size,embed_avg}, dec_t, upsample_t, dec"

_NAMES: Renaming = (
    (re.compile(r"enc_([bt])\.blocks\."), r"encoder_\1."),
    (re.compile(r"dec_t\.blocks\."), "decoder_t."),
    (re.compile(r"dec\.blocks\."), "decoder."),
    (re.compile(r"quantize_conv_([bt])\."), r"project_\1."),
)
_OWN_NAMES: Renaming = (
    (re.compile(r"encoder_([bt])\."), r"enc_\1.blocks."),
    (re.compile(r"decoder_t\."), "dec_t.blocks."),
    (re.compile(r"decoder\."), "dec.blocks."),
    (re.compile(r"project_([bt])\."), r"quantize_conv_\1."),
)
_FORMAT = FORMATS["rosinality"]


def matches(state: dict[str, Tensor]) -> bool:
    return {"enc_b.blocks.0.weight", "quantize_b.embed"} <= state.keys()


def to_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without `steps`, which the dialect does not count."""
    theirs = dict(state)
    own: dict[str, Tensor] = {}
    for level in "bt":
        part = {key: theirs.pop(f"quantize_{level}.{key}") for key in _FORMAT.keys if f"quantize_{level}.{key}" in theirs}
        if part.keys() != _FORMAT.keys:  # left for the family to complain about
            own |= {f"quantize_{level}.{key}": tensor for key, tensor in part.items()}
            continue
        converted = _FORMAT.to_own(part)
        own |= {f"quantizer_{level}.{key}": tensor for key, tensor in converted.items() if key != "steps"}
    for key, tensor in renamed(theirs, _NAMES).items():
        own[key.replace(".conv.1.", ".conv1.").replace(".conv.3.", ".conv2.")] = tensor
    return own


def from_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    own = dict(state)
    theirs: dict[str, Tensor] = {}
    for level in "bt":
        prefix = f"quantizer_{level}."
        part = {key.removeprefix(prefix): own.pop(key) for key in list(own) if key.startswith(prefix)}
        theirs |= {f"quantize_{level}.{key}": tensor for key, tensor in _FORMAT.from_own(part).items()}
    for key, tensor in renamed(own, _OWN_NAMES).items():
        theirs[key.replace(".conv1.", ".conv.1.").replace(".conv2.", ".conv.3.")] = tensor
    return theirs
