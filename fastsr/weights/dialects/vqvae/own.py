"""VQ-VAE in this package's own names."""

from __future__ import annotations

from torch import Tensor

NAME = "fastsr"
ABOUT = "VQVAE (fastsr)"
EXPECTED = "encoder.{i}, project, quantizer.codebook, decoder.{i}"


def matches(state: dict[str, Tensor]) -> bool:
    return {"encoder.0.weight", "quantizer.codebook"} <= state.keys()


def to_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def from_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state
