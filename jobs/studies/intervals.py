"""Means over seeds with their uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


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
    return Interval(mean, float(stats.t.ppf(0.975, len(values) - 1)) * error)


def verdict(gain: Interval, margin: float = 0.0) -> str:
    """What an interval of "better minus worse" says of the claim that it is positive, or no further below than that."""
    if gain.low > -margin:
        return "holds"
    return "goes against it" if gain.high < -margin else "not told apart"
