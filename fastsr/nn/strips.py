"""A chain of 3x3 convolutions at rising resolution, at inference: in strips of rows, so that no large tensor is ever whole.

    rows of the result        lo ........ hi
    rows of its input       lo-1 ........ hi+1            and so on down to the first input, divided by the factors on the way;
    rows of the one before  lo-2 ........ hi+2            what a convolution makes of a strip's edge rows is wrong there, and not read

At x4 a tensor of 64 channels at the result's resolution has the bytes of 16 in the trunk, in pages that were never written. A strip's
tensors stay in the last-level cache and in the pages of the strip before; the few rows that two strips share are computed twice. The
same operations on the same numbers: every bit equals that of the whole run where the backend's order of summation does not depend on
the height, as that of `compiled` does not. Two cores, 256x256, whole -> strips: RRDBNet's tail 697 -> 590 ms in float32 and 182 -> 107
in bfloat16, RCAN's 405 -> 365 and 109 -> 60.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsr import backends
from fastsr.backends import Backend
from fastsr.nn.module import compute_dtype, empty_buffer

#: Bytes of a strip's largest tensor: of a CPU's last-level cache; on a GPU enough to keep it busy.
STRIP_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
FEWEST_ROWS = 16


@dataclass(frozen=True)
class Part:
    """One convolution: `run(x, out=...)`, its output's channels, the factor of its input's rows and that of its PixelShuffle."""

    run: Callable[..., Tensor]
    channels: int
    upsample: int = 1
    pixel_shuffle: int = 1

    @property
    def factor(self) -> int:
        return self.upsample * self.pixel_shuffle


def run_parts(z: Tensor, parts: Sequence[Part], backend: Backend) -> Tensor:
    """All parts after each other; without gradients."""
    rows = _rows(z, parts, backend)
    if rows is None:
        for part in parts:
            z = part.run(z)
        return z
    heights, widths = [z.shape[2]], [z.shape[3]]
    for part in parts:
        heights.append(heights[-1] * part.factor)
        widths.append(widths[-1] * part.factor)
    result = empty_buffer(z, parts[-1].channels, (heights[-1], widths[-1]))
    buffers: dict[int, Tensor] = {}
    for low in range(0, heights[-1], rows):
        windows = _windows(low, min(low + rows, heights[-1]), parts, heights)
        first, end = windows[0]
        x = z[:, :, first:end]
        for k, part in enumerate(parts):
            count = x.shape[2] * part.factor
            if k not in buffers or buffers[k].shape[2] < count:
                buffers[k] = empty_buffer(z, part.channels, (count, widths[k + 1]))
            y = part.run(x, out=buffers[k][:, :, :count])
            first, (begin, end) = first * part.factor, windows[k + 1]
            x, first = y[:, :, begin - first : end - first], begin
        result[:, :, begin:end] = x
    return result


def _rows(z: Tensor, parts: Sequence[Part], backend: Backend) -> int | None:
    """Rows of the result in a strip; None to run it whole."""
    if z.numel() == 0 or torch.compiler.is_compiling() or backends.choose("conv3x3", backend, z).backend == "reference":
        return None
    n, _, height, width = z.shape
    factor, most = 1, 0.0
    for part in parts:
        factor *= part.factor
        most = max(most, part.channels * factor * factor)  # values for each pixel of z
    bytes_of_row = n * width * most / factor * compute_dtype(z).itemsize
    rows = max(FEWEST_ROWS, int(STRIP_BYTES.get(z.device.type, STRIP_BYTES["cuda"]) / bytes_of_row))
    rows = -(-rows // factor) * factor
    return rows if 2 * rows <= height * factor else None


def _windows(low: int, high: int, parts: Sequence[Part], heights: Sequence[int]) -> list[tuple[int, int]]:
    """Of each part's input, then of the result: the rows that rows [low, high) of the result need."""
    windows = [(low, high)]
    for part, height in zip(reversed(parts), reversed(heights[:-1]), strict=True):
        r, u = part.pixel_shuffle, part.upsample
        low, high = low // r - 1, -(-high // r) + 1
        low, high = max(0, low // u), min(height, -(-high // u))
        windows.append((low, high))
    return windows[::-1]

