"""How much memory a picture takes, and how it is cut so that it fits.

The tail of a super-resolution network works at the resolution of the result and needs many times the memory of its
trunk. So the trunk runs whole and the tail in strips of rows, which is exact. Only where the trunk itself does not fit,
the picture is cut into overlapping tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

#: Rows of features that a strip needs beyond its own on each side: the tail's convolutions reach no further.
STRIP_OVERLAP = 2

#: Pixels that neighbouring tiles share. The outer quarter of a tile's overlap is thrown away, the middle half blended.
TILE_OVERLAP = 32

#: The smallest tile: half of it is its own.
MIN_TILE = 2 * TILE_OVERLAP

#: Rows of a strip below which the overlap costs more than a quarter: taken only where memory asks for it.
LOW_STRIP = 16

#: Below this, cutting the tail into strips saves nothing that matters.
SMALL = 64 << 20

#: Of the memory that is free, what a picture may take where no budget is given.
SHARE = 0.8

#: A backend that makes no use of fused kernels holds about this many times more.
EAGER_FACTOR = 2


class Streamable(Protocol):
    """A network in two parts: `tail(features(x))` is its result before the crop; see `fastsr.models.RRDBNet` and `fastsr.models.RCAN`."""

    scale: int
    unshuffle: int
    num_feat: int
    trunk_share: float
    tail_scale: int
    trunk_values: int
    tail_values: int


@dataclass(frozen=True)
class Plan:
    """How a picture goes through a network.

    rows: of features in each strip of the tail.
    tile: height and width of the tiles in pixels of the picture, or None: the trunk runs whole.
    work: bytes that the network holds at its peak, as estimated.
    """

    rows: int
    tile: tuple[int, int] | None
    work: int


def plan(model: Streamable, n: int, h: int, w: int, value_bytes: int, limit: int | None, eager: bool = False) -> Plan:
    """How (n, c, h, w) goes through `model` with at most `limit` bytes of working memory (None: no limit).

    Raises:
        MemoryError: even the smallest tile needs more.
    """
    factor = max(1, n) * value_bytes * (EAGER_FACTOR if eager else 1)
    tile = None
    need = _Need(model, factor, h, w)
    if limit is not None and not need.fits(limit):
        tile = _tile(model, factor, h, w, limit)
        need = _Need(model, factor, *tile)
    enough = max(need.trunk, need.tail(LOW_STRIP), SMALL)  # the tail need not take less than the trunk did
    rows = max(1, need.rows(enough if limit is None else min(enough, limit)))
    return Plan(rows, tile, max(need.trunk, need.tail(rows)))


class _Need:
    """Bytes that a picture of this size takes: in the trunk, and in the tail by the rows of a strip."""

    def __init__(self, model: Streamable, factor: int, h: int, w: int) -> None:
        self.h, self.w = math.ceil(h / model.unshuffle), math.ceil(w / model.unshuffle)
        self.trunk = self.h * self.w * model.trunk_values * factor
        self.kept = self.h * self.w * model.num_feat * factor
        self.row = self.w * model.tail_values * factor

    def tail(self, rows: int) -> int:
        return self.kept + self.row * min(rows + 2 * STRIP_OVERLAP, self.h)

    def rows(self, limit: int) -> int:
        """Rows of the highest strip within `limit` bytes; 0 if none fits."""
        reached = (limit - self.kept) // self.row
        return self.h if reached >= self.h else max(0, reached - 2 * STRIP_OVERLAP)

    def fits(self, limit: int) -> bool:
        return self.trunk <= limit and self.rows(limit) >= 1


def _tile(model: Streamable, factor: int, h: int, w: int, limit: int) -> tuple[int, int]:
    """The largest tile that fits: as square as the picture lets it be, a multiple of the pixel-unshuffle."""
    best = None
    side = MIN_TILE
    while side <= max(h, w):
        size = min(side, h), min(side, w)
        if not _Need(model, factor, *size).fits(limit):
            break
        best = size
        side += 4  # a multiple of every pixel-unshuffle
    if best is None:
        least = _Need(model, factor, min(MIN_TILE, h), min(MIN_TILE, w))
        needed = max(least.trunk, least.tail(1))
        raise MemoryError(
            f"upscale: {limit / 1e6:.1f} MB of memory are too few for a picture of {w}x{h}; the smallest tile needs {needed / 1e6:.1f} MB"
        )
    return best


def spans(length: int, tile: int, overlap: int = TILE_OVERLAP) -> list[tuple[int, int]]:
    """Start and stop of tiles of about equal length, at most `tile`, that cover `length` and overlap by `overlap` each."""
    if tile >= length:
        return [(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    size = math.ceil((length + (count - 1) * overlap) / count / 4) * 4
    starts = range(0, length - overlap, size - overlap)
    return [(start, min(start + size, length)) for start in starts]


def ramp(start: int, stop: int, length: int, scale: int, like: Tensor) -> Tensor:
    """The weight of each of a tile's result pixels along one side; with those of its neighbours it sums to one."""
    weight = torch.ones((stop - start) * scale, dtype=like.dtype, device=like.device)
    cut, blended = TILE_OVERLAP * scale // 4, TILE_OVERLAP * scale // 2
    slope = (torch.arange(blended, dtype=like.dtype, device=like.device) + 0.5) / blended
    if start > 0:
        weight[:cut], weight[cut : cut + blended] = 0, slope
    if stop < length:
        weight[len(weight) - cut :], weight[len(weight) - cut - blended : len(weight) - cut] = 0, slope.flip(0)
    return weight


def available(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [_meminfo(), _cgroup()]
    return min((value for value in found if value is not None), default=None)


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _cgroup() -> int | None:
    """What the container that this process may live in leaves; the cache of files counts as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / "memory.current").read_text())
        return max(0, int(limit) - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))
    except (OSError, ValueError):
        return None


def out_of_memory(error: BaseException) -> bool:
    """True if a smaller piece might go through where this error was raised."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
