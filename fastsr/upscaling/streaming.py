"""A picture through a network: the trunk whole and the tail in strips, or tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsr.upscaling.budget import STRIP_OVERLAP, Plan, ramp, spans

Progress = Callable[[float], None]


class NotFinite(ArithmeticError):
    """The network gave NaN or infinity."""


def run(model: Any, x: Tensor, dtype: torch.dtype, plan: Plan, progress: Progress) -> Tensor:
    """The result for x (N, C, H, W), clamped to 0..1, in `dtype`.

    Raises:
        NotFinite: there is NaN or infinity in it.
    """
    if plan.tile is None:
        return strips(model, x, dtype, plan.rows, progress)
    return tiles(model, x, dtype, plan, progress)


def whole(model: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for a network that cannot be taken apart."""
    return _checked(model(x)).to(dtype).clamp_(0, 1)


def strips(model: Any, x: Tensor, dtype: torch.dtype, rows: int, progress: Progress) -> Tensor:
    """The trunk whole, then the tail for `rows` rows of features at a time.

    Each strip gets two rows more on either side, whose results are thrown away: no result pixel depends on features
    further off, so that the strips' results are those of the whole. At the picture's border there is nothing to add,
    and the tail's own zero padding stands.
    """
    trunk_share = model.trunk_share
    features = model.features(x, lambda done: progress(trunk_share * done))
    h, s = features.shape[2], model.tail_scale
    height, width = x.shape[2] * model.scale, x.shape[3] * model.scale
    out: Tensor | None = None
    for start in range(0, h, rows):
        stop = min(start + rows, h)
        low, high = max(0, start - STRIP_OVERLAP), min(h, stop + STRIP_OVERLAP)
        strip = model.tail(features[:, :, low:high])[:, :, (start - low) * s : (stop - low) * s, :width]
        if out is None:
            out = torch.empty((x.shape[0], strip.shape[1], height, width), dtype=dtype, device=x.device)
        part = out[:, :, start * s : stop * s]  # the last may be shorter than the strip: the crop
        part.copy_(_checked(strip)[:, :, : part.shape[2]]).clamp_(0, 1)
        progress(trunk_share + (1 - trunk_share) * stop / h)
    assert out is not None
    return out


def tiles(model: Any, x: Tensor, dtype: torch.dtype, plan: Plan, progress: Progress) -> Tensor:
    """Overlapping tiles, blended where they overlap."""
    assert plan.tile is not None
    n, _, h, w = x.shape
    s = model.scale
    down, across = spans(h, plan.tile[0]), spans(w, plan.tile[1])
    out: Tensor | None = None
    count = len(down) * len(across)
    for i, (top, bottom) in enumerate(down):
        for j, (left, right) in enumerate(across):
            inside = _part(progress, i * len(across) + j, count)
            tile = strips(model, x[:, :, top:bottom, left:right], dtype, plan.rows, inside)
            if out is None:
                out = torch.zeros((n, tile.shape[1], h * s, w * s), dtype=dtype, device=x.device)
            tile.mul_(ramp(top, bottom, h, s, tile)[:, None]).mul_(ramp(left, right, w, s, tile))
            out[:, :, top * s : bottom * s, left * s : right * s] += tile
    assert out is not None
    return out


def _part(progress: Progress, done: int, count: int) -> Progress:
    """Progress inside of one of `count` pieces, after `done` of them."""
    return lambda part: progress((done + part) / count)


def _checked(y: Tensor) -> Tensor:
    if not torch.isfinite(y).all():
        raise NotFinite
    return y
