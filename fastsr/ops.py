"""The operators. Each is documented at its own function; `fastsr info` tells which backend runs it here."""

from fastsr.kernels.channel_attention.op import channel_attention
from fastsr.kernels.conv3x3.op import conv3x3
from fastsr.kernels.dense_block.op import dense_block
from fastsr.kernels.packing import pack_weights
from fastsr.kernels.rcab.op import rcab
from fastsr.kernels.vector_quantize.op import VQOutput, vector_quantize
from fastsr.kernels.vq_nearest.op import vq_nearest

__all__ = ["VQOutput", "channel_attention", "conv3x3", "dense_block", "pack_weights", "rcab", "vector_quantize", "vq_nearest"]
