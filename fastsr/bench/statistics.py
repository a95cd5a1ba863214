"""Medians with their spread; every sample is kept beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted values, linear between neighbours."""
    if not ordered:
        raise ValueError("quantile of no samples; expected at least one")
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    return quantile(sorted(values), 0.5)


def summary(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Median, quartiles, extremes and count of all samples, and the medians of the rounds (which show drift)."""
    ordered = sorted(sample for samples in rounds for sample in samples)
    return {
        "median": quantile(ordered, 0.5),
        "q1": quantile(ordered, 0.25),
        "q3": quantile(ordered, 0.75),
        "min": ordered[0],
        "max": ordered[-1],
        "n": len(ordered),
        "round_medians": [median(samples) for samples in rounds if samples],
    }
