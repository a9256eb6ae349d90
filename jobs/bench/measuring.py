"""What the benches share."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.argument_types import file_to_write, int_from
from jobs.cli import CommandError, Parser

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor, nn

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


def in_units(count: float) -> str:
    """Three digits and a power of ten by its letter: 950, 1.23 k, 45.6 M."""
    for unit in ("", " k", " M", " G"):
        if count < 999.5:
            return f"{count:.0f}" if not unit else f"{short(count)}{unit}"
        count /= 1000
    return f"{short(count)} T"


def with_share(values: Sequence[float]) -> str:
    """``median ±half the distance between the quartiles``, as a share of the median."""
    low, middle, high = quartiles(values)
    return f"{short(middle)} ±{(high - low) / 2 / middle:.0%}" if middle else "0"


def with_spread(values: tuple[float, float, float]) -> str:
    """``median (lower quartile .. upper quartile)``."""
    low, middle, high = values
    return f"{short(middle)} ({short(low)} .. {short(high)})"


def step_of(layer: nn.Module, hidden: Tensor) -> Callable[[], float]:
    """One forward and backward pass of a layer, in milliseconds; no gradients are left from before, nor afterwards."""
    import torch

    directions: list[Tensor] = []  # one, made in the first pass, which only warms up

    def forward_and_backward() -> None:
        output = layer(hidden)
        output = output[0] if isinstance(output, tuple) else output
        if not directions:
            directions.append(torch.randn_like(output))
        output.backward(directions[0])

    def step() -> float:
        milliseconds = time_of(forward_and_backward)
        hidden.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        return milliseconds

    return step


def time_of(work: Callable[[], Any]) -> float:
    """Milliseconds on the wall clock."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def bench_parser(name: str, summary: str, rounds: int | None) -> Parser:
    """The options that every bench has; ``rounds`` unless told otherwise, None where nothing is timed."""
    parser = Parser(prog=f"mmada bench {name}", description=summary, allow_abbrev=False)
    if rounds is not None:
        parser.add_argument("--rounds", type=int_from(2), default=rounds, metavar="N", help=f"timed rounds ({rounds})")
    parser.add_argument("--threads", type=int_from(1), metavar="N", help="threads of PyTorch (default: as it chooses)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write every single time there, too")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: does it run?")
    return parser


def whole_numbers(text: str) -> list[int]:
    """Reads ``512,1024``; raises argparse.ArgumentTypeError."""
    return [int_from(1)(each) for each in text.split(",")]


def peer(module: str, package: str) -> Any:
    """A module that we compare with and do not depend on. Raises CommandError naming the package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CommandError(
            f"package={package} is needed by this bench alone and cannot be imported ({error}); pip install {package}"
        ) from error


def run_bench(options: argparse.Namespace, measure: Callable[[int], tuple[list[RenderableType], Any]]) -> int:
    """Measure with the threads that were asked for, print what comes out and write the figures; 0.

    ``measure(threads)`` returns what to print, and everything there is to write as JSON.
    """
    from rich.console import Console

    from cluster.terminal import quiet_terminal

    with (
        tempfile.TemporaryDirectory(prefix="mmada-bench-") as folder,
        quiet_terminal(Path(folder) / "log.txt") as terminal,
        torch_threads(options.threads) as num_threads,
    ):
        console = Console(file=terminal, highlight=False, width=120)
        console.print("measuring …")
        printed, figures = measure(num_threads)
        for each in printed:
            console.print(each)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0
