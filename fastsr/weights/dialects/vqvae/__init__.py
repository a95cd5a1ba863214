"""VQVAE: its dialect, and the sizes that a state dict in this package's own names is for."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from fastsr.models import VQVAE
from fastsr.weights.dialects.dialect import Dialect
from fastsr.weights.dialects.filling import check_needed, filled
from fastsr.weights.dialects.vqvae import own
from fastsr.weights.errors import WeightsError

NETWORK = VQVAE
DIALECTS: tuple[Dialect, ...] = (own,)


def build(state: dict[str, Tensor], dialect: Dialect) -> VQVAE:
    """The network with the sizes that the tensors have; costs and decays, which no tensor shows, are the defaults."""
    options = sizes(state, "encoder", "quantizer")
    return filled(lambda: VQVAE(**options), state, "a VQVAE")


def express(model: VQVAE, dialect: Dialect) -> dict[str, Tensor]:
    """The network's state dict.

    Raises:
        ValueError: a metric that no file shows.
    """
    check_metric(model.quantizer.metric)
    return dialect.from_own({key: tensor.detach() for key, tensor in model.state_dict().items()})


def check_metric(metric: str) -> None:
    """A file looks the same with every metric, and is read as euclidean."""
    if metric != "euclidean":
        raise ValueError(f"save: the quantiser's metric is {metric!r}, which no file shows; expected 'euclidean'")


def sizes(state: dict[str, Tensor], encoder: str, quantizer: str) -> dict[str, Any]:
    """Constructor arguments from the encoder that sees the image and its quantiser.

    Raises:
        WeightsError: a tensor that they are read from is missing or ill-shaped.
    """
    check_needed(state, (f"{encoder}.0.weight",), "a VQVAE")
    steps = 0
    while (tensor := state.get(f"{encoder}.{2 * steps}.weight")) is not None and tuple(tensor.shape[2:]) == (4, 4):
        steps += 1
    last = f"{encoder}.{2 * steps}.weight"
    check_needed(state, (last,), "a VQVAE")
    residual = re.compile(rf"{encoder}\.\d{{1,6}}\.conv1\.weight")
    blocks = [key for key in state if residual.fullmatch(key)]
    check_needed(state, blocks[:1], "a VQVAE")
    codebook = state[f"{quantizer}.codebook"]
    if not steps or codebook.dim() not in (2, 3) or 0 in codebook.shape:
        shape = tuple(codebook.shape)
        raise WeightsError(f"{steps} 4x4 convolutions in {encoder}, codebook of shape {shape}; expected some, and (K, D) or (heads, K, D)")
    options: dict[str, Any] = {
        "num_in_ch": state[f"{encoder}.0.weight"].shape[1],
        "num_feat": state[last].shape[0],
        "num_block": len(blocks),
        "num_res_ch": state[blocks[0]].shape[0] if blocks else 1,
        "codebook_size": codebook.shape[-2],
        "codebook_dim": codebook.shape[-1],
        "downscale": 2**steps,
    }
    if codebook.dim() == 3:
        options["num_heads"] = codebook.shape[0]
    if f"{quantizer}.cluster_size" not in state:
        options["decay"] = None
    return options
