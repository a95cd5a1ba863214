"""Nearest-code search in plain PyTorch: the truth for every test, and the order of summation that every kernel keeps.

A float64 distance is rounded, so two codes that lie equally far may differ in its last bit, and which one wins depends on the
order of summation. That order is therefore part of the operator: the squares of channels j, j + 8, j + 16, ... are summed in
that order in lane j, without fused multiply-adds; then lanes 4..7 are added to 0..3, 2..3 to 0..1 and 1 to 0. Every backend
computes these very bits wherever it compares distances.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 8

#: float64 values of one temporary; a chunk of rows and codes is made so large.
CHUNK_VALUES = 1 << 18


def distance_dtype(x: Tensor) -> torch.dtype:
    """Of distances, losses and sums: float32, and float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def search(x: Tensor, codebook: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """Indices (O, H, I) and float64 squared distances, of x (O, H, D, I) and codebook (H, K, D): steps 1-3 of `fastsr.ops.vq_nearest`.

    No temporary is larger than `CHUNK_VALUES`, beside float64 copies of the arguments."""
    o, h, d, i = x.shape
    rows = x.permute(1, 0, 3, 2).reshape(h, o * i, d)
    found = [_search_head(rows[head], codebook[head], cosine) for head in range(h)]
    indices, distances = (torch.stack(part).view(h, o, i).transpose(0, 1).contiguous() for part in zip(*found, strict=True))
    return indices, distances


def _search_head(rows: Tensor, codes: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    return _nearest_of_all(_lanes(rows, cosine), _lanes(codes, cosine))


def _nearest_of_all(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and distances of rows and codes in lanes, a chunk at a time."""
    n, k = len(rows), len(codes)
    codes_at_once = min(k, CHUNK_VALUES // LANES)
    rows_at_once = max(1, CHUNK_VALUES // (LANES * codes_at_once))
    indices = torch.empty(n, dtype=torch.int64, device=rows.device)
    distances = torch.empty(n, dtype=torch.float64, device=rows.device)
    for begin in range(0, n, rows_at_once):
        part = slice(begin, begin + rows_at_once)
        best = [_nearest(rows[part], codes[first : first + codes_at_once], first) for first in range(0, k, codes_at_once)]
        # The first of several minima, and of several NaN, is the one with the lowest index.
        values, winners = torch.stack([b[0] for b in best]), torch.stack([b[1] for b in best])
        choice = values.argmin(0, keepdim=True)
        distances[part] = values.gather(0, choice)[0]
        indices[part] = winners.gather(0, choice)[0]
    return indices, distances


def _lanes(values: Tensor, cosine: bool) -> Tensor:
    """(n, D) as float64 (n, ceil(D / 8), 8); with `cosine` divided by the row's norm, where that is not zero."""
    n, d = values.shape
    values = F.pad(values.double(), (0, -d % LANES)).view(n, (d + LANES - 1) // LANES, LANES)
    if not cosine:
        return values
    norms = _sqrt(_sum_of_squares(values))[:, None, None]
    return values / torch.where(norms == 0, 1.0, norms)


def _sum_of_squares(values: Tensor) -> Tensor:
    """Over the last two sizes, in the operator's order."""
    total = torch.zeros_like(values[..., 0, :])
    for j in range(values.shape[-2]):
        total += values[..., j, :].square()
    return _fold(total)


def _sqrt(values: Tensor) -> Tensor:
    """The correctly rounded square root, as processors have it: torch's own on a CPU is off by a unit in the last place at times."""
    root = values.sqrt()
    high = root * (2**27 + 1)
    high = high - (high - root)
    low = root - high
    square = root * root
    rest = ((high * high - square) + 2 * high * low) + low * low  # root^2 = square + rest, exactly (Dekker)
    better = root + ((values - square) - rest) / (2 * root)
    return torch.where(better.isfinite(), better, root)


def _fold(lanes: Tensor) -> Tensor:
    """The sum over the eight lanes in the operator's order."""
    four = lanes[..., :4] + lanes[..., 4:]
    two = four[..., :2] + four[..., 2:]
    return two[..., 0] + two[..., 1]


def _nearest(rows: Tensor, codes: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The smallest distance of each row and its code's index; `first` is the index of codes[0]."""
    total = rows.new_zeros((len(rows), len(codes), LANES))
    for j in range(rows.shape[1]):
        total += (rows[:, None, j] - codes[None, :, j]).square_()
    distances = _fold(total)
    winner = distances.argmin(1)  # the first of several minima; NaN is smaller than all
    return distances.gather(1, winner[:, None])[:, 0], winner + first
