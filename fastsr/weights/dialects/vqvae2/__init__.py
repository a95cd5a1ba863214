"""VQVAE2: its dialects, and the sizes that a state dict in this package's own names is for."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsr.models import VQVAE2
from fastsr.weights.dialects.dialect import Dialect
from fastsr.weights.dialects.filling import filled
from fastsr.weights.dialects.vqvae import check_metric, sizes
from fastsr.weights.dialects.vqvae2 import own, rosinality
from fastsr.weights.errors import WeightsError, some

NETWORK = VQVAE2
DIALECTS: tuple[Dialect, ...] = (own, rosinality)


def build(state: dict[str, Tensor], dialect: Dialect) -> VQVAE2:
    """The network with the sizes that the tensors have; costs and decays, which no tensor shows, are the defaults."""
    if "quantizer_b.codebook" not in state:
        raise WeightsError(f"a VQVAE2 lacks a quantiser of its finer level: {some(state)}; expected {dialect.EXPECTED}")
    options = sizes(state, "encoder_b", "quantizer_b")
    if dialect is rosinality:
        state = state | {f"quantizer_{level}.steps": torch.zeros((), dtype=torch.int64) for level in "bt"}
    return filled(lambda: VQVAE2(**options), state, "a VQVAE2")


def express(model: VQVAE2, dialect: Dialect) -> dict[str, Tensor]:
    """The network's state dict in a dialect.

    Raises:
        ValueError: the dialect cannot express the network, or a metric that no file shows.
    """
    check_metric(model.quantizer_b.metric)
    if dialect is rosinality and not hasattr(model.quantizer_b, "cluster_size"):
        raise ValueError(f"save: dialect is {dialect.NAME!r}, whose codebooks are moving averages; expected a network with a decay")
    return dialect.from_own({key: tensor.detach() for key, tensor in model.state_dict().items()})
