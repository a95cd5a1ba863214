"""TensorRT on a GPU: the plain network through torch_tensorrt's backend of torch.compile."""

from __future__ import annotations

import torch
from torch import nn

from fastsr.bench.case import Call, Unavailable


def compile_network(network: nn.Module, dtype: torch.dtype) -> Call:
    """A call that runs `network` on TensorRT in this dtype.

    Raises:
        Unavailable: torch_tensorrt is not installed.
    """
    try:
        import torch_tensorrt  # noqa: F401
    except ImportError as error:
        raise Unavailable("TensorRT is not installed; pip install torch-tensorrt") from error
    options = {"enabled_precisions": {dtype}, "use_explicit_typing": False}
    return torch.compile(network, backend="tensorrt", dynamic=False, options=options)
