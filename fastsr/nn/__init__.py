"""Modules on top of the operators; parameter names and state dicts are those of the modules they stand for."""

from fastsr.nn.attention import CAB, ChannelAttention, SqueezeExcite
from fastsr.nn.freezing import freeze, unfreeze
from fastsr.nn.module import Conv3x3, Module, needs_grad
from fastsr.nn.rcan import RCAB, ResidualGroup
from fastsr.nn.rrdb import RRDB, ResidualDenseBlock, ResidualDenseBlockPlus

__all__ = [
    "CAB",
    "RCAB",
    "RRDB",
    "ChannelAttention",
    "Conv3x3",
    "Module",
    "ResidualDenseBlock",
    "ResidualDenseBlockPlus",
    "ResidualGroup",
    "SqueezeExcite",
    "freeze",
    "needs_grad",
    "unfreeze",
]
