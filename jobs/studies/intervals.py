"""Means with their uncertainty: over seeds, and over what was evaluated."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval (Student's t; infinite for one value)."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def interval(values: Sequence[float]) -> Interval:
    """Of independent values, one per seed; for a difference of two variants, of the differences seed by seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, float(scipy.stats.t.ppf(0.975, len(values) - 1)) * error)


def verdict(gain: Interval, margin: float = 0.0) -> str:
    """What an interval of "better minus worse" says of the claim that it is positive, or no further below than that."""
    if gain.low > -margin:
        return "holds"
    return "goes against it" if gain.high < -margin else "not told apart"


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` independent values with its 95 % interval, which need not be symmetric."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def wilson(right: int, count: int) -> Estimate:
    """A share of ``count`` trials, with Wilson's score interval: sound near 0 and 1, too."""
    found = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    return Estimate(right / count, float(found.low), float(found.high), count)


def bootstrap(values: Sequence[float], *, resamples: int = 5000, seed: int = 0) -> Estimate:
    """A mean, with the percentile interval of means of values drawn from these again (Efron 1979)."""
    mean = statistics.fmean(values)
    if len(set(values)) == 1:  # nothing to draw differently: as narrow as the values themselves
        return Estimate(mean, mean, mean, len(values))
    found = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, batch=500, method="percentile", rng=seed
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), len(values))
