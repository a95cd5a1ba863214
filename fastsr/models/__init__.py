"""Whole networks: nothing but modules put together."""

from fastsr.models.rrdbnet import RRDBNet

__all__ = ["RRDBNet"]
