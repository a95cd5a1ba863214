"""Modules on top of the operators; parameter names and state dicts are those of the modules they stand for."""

from fastsr.nn.freezing import freeze, unfreeze
from fastsr.nn.module import Conv3x3, Module, needs_grad
from fastsr.nn.rrdb import RRDB, ResidualDenseBlock, ResidualDenseBlockPlus

__all__ = ["RRDB", "Conv3x3", "Module", "ResidualDenseBlock", "ResidualDenseBlockPlus", "freeze", "needs_grad", "unfreeze"]
