"""fastsr: fused operators, modules and networks for super-resolution and vector quantisation.

What is named here is imported when it is first used: `import fastsr` costs nothing and leaves torch's environment variables to be set.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastsr._version import __version__

if TYPE_CHECKING:
    from fastsr import memory, models, nn, ops
    from fastsr.backends import BackendUnavailable, set_backend
    from fastsr.fusion import fuse_, fused, unfuse_
    from fastsr.graphs import cuda_graph
    from fastsr.nn.freezing import freeze, unfreeze
    from fastsr.upscaling import upscale, upscale_many
    from fastsr.weights import WeightsError, load, save

#: name -> the module that defines it; packages are found by their own name.
_HOMES = {
    "BackendUnavailable": "backends",
    "WeightsError": "weights",
    "cuda_graph": "graphs",
    "freeze": "nn.freezing",
    "fuse_": "fusion",
    "fused": "fusion",
    "load": "weights",
    "save": "weights",
    "set_backend": "backends",
    "unfreeze": "nn.freezing",
    "unfuse_": "fusion",
    "upscale": "upscaling",
    "upscale_many": "upscaling",
}
_PACKAGES = ("backends", "fusion", "graphs", "memory", "models", "nn", "ops", "upscaling", "weights")

__all__ = [
    "BackendUnavailable",
    "WeightsError",
    "__version__",
    "cuda_graph",
    "freeze",
    "fuse_",
    "fused",
    "load",
    "memory",
    "models",
    "nn",
    "ops",
    "save",
    "set_backend",
    "unfreeze",
    "unfuse_",
    "upscale",
    "upscale_many",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"fastsr.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"fastsr.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastsr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
