"""Whole networks: nothing but modules put together."""

from fastsr.models.rcan import RCAN
from fastsr.models.rrdbnet import RRDBNet

__all__ = ["RCAN", "RRDBNet"]
