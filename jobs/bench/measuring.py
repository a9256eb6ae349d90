"""What the benches share."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

MATMUL_SIZE = 2048


def matmul_seconds() -> float:
    """One float32 product of two square matrices of MATMUL_SIZE, on the wall clock: the machine's peak."""
    import torch

    left, right, product = torch.randn(3, MATMUL_SIZE, MATMUL_SIZE)
    started = time.perf_counter()
    torch.mm(left, right, out=product)
    return time.perf_counter() - started


def matmul_flops(seconds: float) -> float:
    """FLOP/s of such a product that took so long."""
    return 2 * MATMUL_SIZE**3 / seconds


@dataclass
class Timings:
    """Milliseconds of one contender, one for each round, so that contenders can be compared round by round."""

    name: str
    milliseconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.milliseconds)

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    def ratios(self, floor: Timings) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the time over the floor's, round by round."""
        return quartiles([own / base for own, base in zip(self.milliseconds, floor.milliseconds, strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; those of a single value are the value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def in_turns(steps: Mapping[str, Callable[[], T]], rounds: int, warm_ups: int = 2) -> dict[str, list[T]]:
    """Run every contender once a round, each round beginning with another one; what each returned, round by round.

    A busy machine slows a whole round, so ratios within a round hold. The first ``warm_ups`` rounds are thrown away.
    """
    results: dict[str, list[T]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(-warm_ups, rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            result = steps[name]()
            if index >= 0:
                results[name].append(result)
    return results


def log_slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power with which ``values`` grow with ``sizes``: the slope of the least-squares line through their logs."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


@contextmanager
def torch_threads(num_threads: int | None) -> Iterator[int]:
    """Run with that many threads (None: leave it to PyTorch); gives how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def short(value: float) -> str:
    """Three digits: 1.23, 12.3, 123."""
    return f"{value:.{max(0, 2 - (len(str(int(value))) - 1))}f}"


def with_spread(values: tuple[float, float, float]) -> str:
    """``median (lower quartile .. upper quartile)``."""
    low, middle, high = values
    return f"{short(middle)} ({short(low)} .. {short(high)})"
