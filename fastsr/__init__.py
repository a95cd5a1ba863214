"""fastsr: fused operators, modules and networks for super-resolution and vector quantisation."""

from fastsr import ops
from fastsr._version import __version__
from fastsr.backends import BackendUnavailable, set_backend

__all__ = ["BackendUnavailable", "__version__", "ops", "set_backend"]
