"""Stand-ins for other libraries' quantisers: their constructor arguments, their state dict, what they return; our operator inside.

    model.quantize = adapters.TamingVectorQuantizer(n_e=1024, e_dim=256, beta=0.25)       # before the weights are loaded, or
    adapters.take_over(model.quantize, adapters.TamingVectorQuantizer(1024, 256, 0.25))   # after: the weights move along

Each is also an `fastsr.nn.VectorQuantizer` or `EMAVectorQuantizer`, with `encode`, `decode` and `codebook`. Matrices of all rows by
all codes that some of them return (one-hot encodings, distances) are None unless `matrices=True` asks for them.
"""

from fastsr.nn.adapters.base import take_over
from fastsr.nn.adapters.gradient import (
    CodeFormerVectorQuantizer,
    DiffusersVectorQuantizer,
    FeMaSRVectorQuantizer,
    RestoreFormerVectorQuantizer,
    TamingVectorQuantizer,
)
from fastsr.nn.adapters.moving_average import RosinalityQuantize, SonnetVectorQuantizerEMA, VectorQuantize

__all__ = [
    "CodeFormerVectorQuantizer",
    "DiffusersVectorQuantizer",
    "FeMaSRVectorQuantizer",
    "RestoreFormerVectorQuantizer",
    "RosinalityQuantize",
    "SonnetVectorQuantizerEMA",
    "TamingVectorQuantizer",
    "VectorQuantize",
    "take_over",
]
