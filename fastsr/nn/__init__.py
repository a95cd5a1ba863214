"""Modules on top of the operators; parameter names and state dicts are those of the modules they stand for."""

from fastsr.nn.attention import CAB, ChannelAttention, SqueezeExcite
from fastsr.nn.ema_vector_quantizer import EMAVectorQuantizer
from fastsr.nn.freezing import freeze, unfreeze
from fastsr.nn.kmeans import kmeans
from fastsr.nn.module import Conv3x3, Module, needs_grad
from fastsr.nn.rcan import RCAB, ResidualGroup
from fastsr.nn.residual_vector_quantizer import ResidualVectorQuantizer
from fastsr.nn.rrdb import RRDB, ResidualDenseBlock, ResidualDenseBlockPlus
from fastsr.nn.vector_quantizer import Quantized, VectorQuantizer

__all__ = [
    "CAB",
    "RCAB",
    "RRDB",
    "ChannelAttention",
    "Conv3x3",
    "EMAVectorQuantizer",
    "Module",
    "Quantized",
    "ResidualDenseBlock",
    "ResidualDenseBlockPlus",
    "ResidualGroup",
    "ResidualVectorQuantizer",
    "SqueezeExcite",
    "VectorQuantizer",
    "freeze",
    "kmeans",
    "needs_grad",
    "unfreeze",
]
