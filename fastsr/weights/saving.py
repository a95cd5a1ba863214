"""`save`: from a network to a file, in any dialect that `load` reads from PyTorch's files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastsr.atomic import atomic_file
from fastsr.weights.dialects import express
from fastsr.weights.formats import safetensors

#: Endings of PyTorch's own files.
PTH = (".pth", ".pt", ".ckpt")


def save(model: nn.Module, path: str | Path, dialect: str = "basicsr", wrapper: str | None = None) -> None:
    """Write a network's weights; `load` gives them back bit for bit.

    Args:
        model: an `RRDBNet`, `RCAN`, `VQVAE` or `VQVAE2`; its parameters are written in the dtype that they have.
        path: ends in .pth, .pt or .ckpt (PyTorch), or in .safetensors. The file appears whole or not at all.
        dialect: "basicsr" for both (also Real-ESRGAN); for an RRDBNet "esrgan" (its later code, BSRGAN, RealSR) or "esrgan-old"
            (its first code, ESRGAN+); for an RCAN "rcan" (its authors' code, EDSR-PyTorch, traiNNer-redux, spandrel);
            for a VQVAE or VQVAE2 "fastsr" (our names), and for a VQVAE2 "rosinality" too.
        wrapper: the key of the dictionary around the state dict, for instance "params_ema", without which
            Real-ESRGAN's own scripts read no file; None for none. For PyTorch's files only.

    Raises:
        TypeError: another kind of network.
        ValueError: an unknown dialect or ending, a wrapper in a safetensors file, or a network that the dialect cannot express: an
            ESRGAN+ in another than its own, an RCAN with a `res_scale` in "rcan" or with a trained MeanShift in "basicsr".
        OSError: the file cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (*PTH, ".safetensors"):
        raise ValueError(f"save: {path.name!r} ends in {ending!r}; expected {', '.join(PTH)} or .safetensors")
    if wrapper is not None and ending not in PTH:
        raise ValueError(f"save: wrapper is {wrapper!r}, but a safetensors file holds tensors alone")
    # copies: a parameter may be a view of something larger, all of which torch.save would write
    state = {key: tensor.cpu().clone(memory_format=torch.contiguous_format) for key, tensor in express(model, dialect).items()}
    with atomic_file(path) as file:
        if ending in PTH:
            torch.save(state if wrapper is None else {wrapper: state}, file)
        else:
            safetensors.write(state, file)
