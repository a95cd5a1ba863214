"""The families of blocks that our operators compute. A family's `match` knows its blocks by their parts, never by a class's name."""

from fastsr.fusion.families.channel_attention import match_channel_attention
from fastsr.fusion.families.convolutions import match_convolutions
from fastsr.fusion.families.dense_block import match_dense_block, match_rrdb
from fastsr.fusion.families.dense_block_plus import match_dense_block_plus
from fastsr.fusion.families.family import Candidate, Fusion, Probe
from fastsr.fusion.families.moving_average import match_moving_average
from fastsr.fusion.families.quantizers import match_quantizer
from fastsr.fusion.families.rcab import match_rcab
from fastsr.fusion.families.wired import match_wired
from fastsr.fusion.families.zalando import match_zalando

#: Tried on a block before its parts, in this order.
MATCHERS = (
    match_dense_block_plus,
    match_dense_block,
    match_rcab,
    match_channel_attention,
    match_quantizer,
    match_moving_average,
    match_zalando,
)
#: Tried on a block once its parts are fused.
COMPOSITES = (match_rrdb, match_convolutions, match_wired)

__all__ = ["COMPOSITES", "MATCHERS", "Candidate", "Fusion", "Probe"]
