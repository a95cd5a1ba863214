"""Medians with their spread; every sample is kept beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
#: A sample further than so many interquartile ranges outside the quartiles is called an outlier (Tukey's "far out").
FAR_OUT = 3.0
RESAMPLES = 2000


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


def median_interval(ordered: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """An interval that holds the true median with at least this confidence, whatever the distribution, and its own confidence.

    Of n independent samples, the number below the median is binomial(n, 1/2): from the k-th smallest to the k-th largest
    is the narrowest symmetric pair of order statistics that suffices; of fewer than six samples none does, and all are taken.
    """
    n = len(ordered)
    k, fewer = 1, 1  # sets of samples, of 2**n, that leave fewer than k of them below the median
    while k < (n + 1) // 2 and 2 * (fewer + math.comb(n, k)) / 2**n <= 1 - confidence:
        fewer += math.comb(n, k)
        k += 1
    return ordered[k - 1], ordered[n - k], 1 - 2 * fewer / 2**n


def outliers(rounds: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    """The samples far outside the quartiles of all, each with its round."""
    ordered = sorted(sample for samples in rounds for sample in samples)
    q1, q3 = quantile(ordered, 0.25), quantile(ordered, 0.75)
    reach = FAR_OUT * (q3 - q1)
    return [
        {"round": number, "seconds": sample}
        for number, samples in enumerate(rounds)
        for sample in samples
        if not q1 - reach <= sample <= q3 + reach
    ]


def ratio_interval(old: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> tuple[float, float]:
    """A 95% interval of median(old) / median(new), by resampling whole rounds and then the samples in them.

    Calls of one round share the state that the machine was in, so that rounds, not calls, are what was repeated.
    """
    generator = np.random.default_rng(0)

    def medians(rounds: Sequence[Sequence[float]]) -> np.ndarray:
        filled = [np.asarray(samples) for samples in rounds if len(samples)]
        found = np.empty(RESAMPLES)
        for i in range(RESAMPLES):
            picked = generator.integers(len(filled), size=len(filled))
            found[i] = np.median(np.concatenate([generator.choice(filled[r], size=len(filled[r])) for r in picked]))
        return found

    low, high = np.quantile(medians(old) / medians(new), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def summary(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Median, quartiles, extremes and count of all samples, outliers by name, and the medians of the rounds (which show drift) with
    an interval from them: calls of one round share the state that the machine was in, so that rounds are what was repeated."""
    ordered = sorted(sample for samples in rounds for sample in samples)
    medians = [median(samples) for samples in rounds if samples]
    low, high, confidence = median_interval(sorted(medians))
    return {
        "median": quantile(ordered, 0.5),
        "interval": [low, high],
        "confidence": confidence,
        "q1": quantile(ordered, 0.25),
        "q3": quantile(ordered, 0.75),
        "min": ordered[0],
        "max": ordered[-1],
        "n": len(ordered),
        "outliers": outliers(rounds),
        "round_medians": medians,
    }
