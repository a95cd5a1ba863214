"""One file for each kind of file. `read` finds out which kind one is by its first bytes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastsr.weights.errors import WeightsError
from fastsr.weights.formats import ncnn, pth, safetensors


def read(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, by name.

    Raises:
        WeightsError: the file is of none of the known kinds, or is broken.
    """
    if path.suffix == ".bin" and path.with_suffix(".param").is_file() and not pth.matches(_head(path)):
        path = path.with_suffix(".param")
    head = _head(path)
    for kind in (ncnn, pth, safetensors):
        if kind.matches(head):
            return kind.read(path)
    if path.suffix == ".bin":
        raise WeightsError(f"no {path.with_suffix('.param').name} beside it; ncnn keeps the network there, and both files are needed")
    raise WeightsError(f"unknown kind of file (it begins with {head[:8]!r}); expected .pth, .safetensors, or ncnn's .param and .bin")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)
