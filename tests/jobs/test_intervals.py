"""Intervals against their formulas, and what they cover."""

import math

import numpy as np
import pytest

from jobs.studies.intervals import bootstrap, wilson


def test_wilson_by_its_formula_and_at_the_ends():
    z, n, p = 1.959963984540054, 50, 0.3
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = wilson(15, 50)
    assert (found.mean, found.low, found.high) == pytest.approx((p, centre - half, centre + half))
    assert wilson(0, 60).low == 0 and 0.05 < wilson(0, 60).high < 0.07
    assert wilson(60, 60).high == 1 and wilson(60, 60).mean == 1


def test_bootstrap_is_as_wide_as_the_values_say_and_the_same_each_time():
    values = np.random.default_rng(0).uniform(size=200).tolist()
    found = bootstrap(values)
    spread = 1.96 * np.std(values) / math.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * spread, rel=0.1)
    assert found.low < found.mean < found.high and found == bootstrap(values)
    assert bootstrap([0.5, 0.5]).low == bootstrap([0.5, 0.5]).high == 0.5
