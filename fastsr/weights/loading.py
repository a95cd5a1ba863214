"""`load`: from a file or a name to a network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastsr.weights.dialects import build
from fastsr.weights.errors import WeightsError
from fastsr.weights.formats import read
from fastsr.weights.names import resolve


def load(path_or_name: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The network that a file of weights is for, with these weights, in eval mode.

        1. A file that exists is taken as it is; else a known name (`fastsr.weights.KNOWN`) is looked up in the
           installed packages.
        2. The file is read: `.pth` (PyTorch; tensors only, no code is ever run), `.safetensors`, or ncnn's `.param` and
           `.bin` (either of the two). What counts is what is in the file, not what it is called.
        3. Its parameter names tell the network, its shapes the sizes. Wrappers (`params_ema`, `params-ema`,
           `params`) and the prefix `module.` are removed.

    Known are: RRDBNet with any number of blocks, channels and x2 steps, with and without pixel-unshuffle, in the dialects
    of BasicSR and Real-ESRGAN, of ESRGAN, BSRGAN and RealSR, of the first ESRGAN and of ESRGAN+; RRDBNet converted for ncnn;
    RCAN of any size in the dialects of BasicSR and of its authors, EDSR-PyTorch and traiNNer-redux; and VQVAE and VQVAE2, the
    latter in rosinality's dialect too (`fastsr.weights.quantizers.read_quantizer` takes one quantiser out of other libraries'
    files). `save` writes the
    PyTorch dialects back. A file does not show an RCAN's `res_scale`, nor in BasicSR's dialect its `img_range` and
    `rgb_mean`: they are 1, 255 and DIV2K's, and attributes to be set. Nothing is allocated before the sizes that a file claims
    have been checked against the file.

    Args:
        path_or_name: a path, or a name such as "realesrgan-x4plus".
        device: where the network shall be; None for the CPU.
        dtype: of the parameters; None for float32, whatever the file has.

    Returns:
        A `fastsr.models` network: `model(x)` takes (N, C, H, W) with values 0..1.

    Raises:
        FileNotFoundError: no such file, and no such name.
        WeightsError: a truncated, unsafe or unknown file, or a known name whose package is missing.
        TypeError: `dtype` is not a floating-point dtype.
    """
    dtype = torch.float32 if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"load: dtype is {dtype}; expected a floating-point dtype")
    path = resolve(path_or_name)
    try:
        model = build(read(path))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return model.to(device=device, dtype=dtype).eval()
