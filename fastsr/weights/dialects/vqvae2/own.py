"""VQ-VAE-2 in this package's own names."""

from __future__ import annotations

from torch import Tensor

NAME = "fastsr"
ABOUT = "VQVAE2 (fastsr)"
EXPECTED = "encoder_{b,t}.{i}, project_{b,t}, quantizer_{b,t}.codebook, decoder_t.{i}, upsample_t, decoder.{i}"


def matches(state: dict[str, Tensor]) -> bool:
    return {"encoder_b.0.weight", "quantizer_b.codebook"} <= state.keys()


def to_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def from_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state
