"""Trained weights in and out: `load` recognises a file by what is in it and returns the network with the right sizes; `save` writes it.

`formats/` has one file for each kind of file, `dialects/` a folder for each family of networks with one for each way of
naming its parameters, `names.py` knows the weights that installed packages bring along.
"""

from fastsr.weights.errors import WeightsError
from fastsr.weights.loading import load
from fastsr.weights.names import KNOWN, NamedWeights
from fastsr.weights.saving import save

__all__ = ["KNOWN", "NamedWeights", "WeightsError", "load", "save"]
