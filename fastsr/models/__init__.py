"""Whole networks: nothing but modules put together."""

from fastsr.models.rcan import RCAN
from fastsr.models.rrdbnet import RRDBNet
from fastsr.models.vqvae import VQVAE, VQVAE2, VQVAEOutput

__all__ = ["RCAN", "VQVAE", "VQVAE2", "RRDBNet", "VQVAEOutput"]
