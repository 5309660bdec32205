"""What is said about repeated measurements, and by which definition.

sd          the sample's standard deviation, with n − 1; 0 of a single value
percentile  linear interpolation between the closest ranks: the value at rank 1 + (n − 1)·p/100 of the sorted
            sample (Hyndman & Fan 1996, definition 7; numpy's and spreadsheets' default)
interval    percentile bootstrap (Efron & Tibshirani 1993, chapter 13): the statistic of resamples drawn with
            replacement, cut at both ends; seeded, so the same sample gives the same interval
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Summary:
    """A sample in a few numbers, in the sample's unit; NaN all of them if it is empty."""

    n: int
    mean: float
    sd: float
    p50: float
    p90: float
    p99: float
    least: float
    most: float

    @property
    def median(self) -> float:
        """The middle of the sample, or the mean of the two in the middle."""
        return self.p50


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the interval that covers it at the level asked for."""

    value: float
    low: float
    high: float


def summarize(sample: Sequence[float] | Floats) -> Summary:
    """Describe a sample."""
    values = np.asarray(sample, dtype=np.float64)
    if values.size == 0:
        return Summary(0, *[math.nan] * 7)
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
    return Summary(
        n=int(values.size),
        mean=float(values.mean()),
        sd=float(values.std(ddof=1)) if values.size > 1 else 0.0,
        p50=p50,
        p90=p90,
        p99=p99,
        least=float(values.min()),
        most=float(values.max()),
    )


def median_interval(
    sample: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The median of a sample, n ≥ 1, with its bootstrap interval."""
    values = np.asarray(sample, dtype=np.float64)
    drawn = values[_draws(values.size, resamples, seed)]
    return _interval(float(np.median(values)), np.median(drawn, axis=-1), level)


def ratio_of_medians(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """median(numerator) / median(denominator) of alternating rounds, with its bootstrap interval.

    Value i of both comes from round i. Rounds are drawn whole, both sides together: what slows a machine for
    a while slows both halves of a round, and drawing them apart would count that twice.

    Raises:
        ValueError: if the samples differ in length or are empty.
    """
    above = np.asarray(numerator, dtype=np.float64)
    below = np.asarray(denominator, dtype=np.float64)
    if above.shape != below.shape or above.size == 0:
        raise ValueError(f"rounds come in pairs: {above.size} against {below.size}")
    draws = _draws(above.size, resamples, seed)
    ratios = np.median(above[draws], axis=-1) / np.median(below[draws], axis=-1)
    return _interval(float(np.median(above) / np.median(below)), ratios, level)


def goodput(met: Sequence[bool], seconds: float) -> float:
    """Requests per second that met their objectives: those marked true, over the wall time of all of them."""
    return sum(met) / seconds if seconds > 0 else math.nan


def _draws(n: int, resamples: int, seed: int) -> NDArray[np.int64]:
    if n == 0:
        raise ValueError("an empty sample has no interval")
    return np.random.default_rng(seed).integers(0, n, size=(resamples, n))


def _interval(value: float, resampled: Floats, level: float) -> Interval:
    tail = 50 * (1 - level)
    low, high = np.percentile(resampled, (tail, 100 - tail))
    return Interval(value, float(low), float(high))
