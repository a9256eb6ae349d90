"""``train.micro_batch: auto``: how the largest micro batch that fits is looked for. Computes only.

``jobs.micro_batch_trials`` measures in the workers; ``mmada plan`` goes by its own estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jobs.recipe import Recipe
from jobs.recipe_checks import divisors
from jobs.stages import stages_of

# Of the memory that a worker has, what is left to what no trial sees: buffers inside libraries, gaps between tensors,
# rows that are routed or cut otherwise than those of the trial.
KEPT_FREE = 0.1


@dataclass(frozen=True)
class Usage:
    """Bytes that a step takes at the most, weights and optimizer states among them, and what its forward passes add."""

    peak: int
    forward: int


@dataclass(frozen=True)
class Search:
    """What ``climb`` came to. ``rows``: the largest that fits, 0 for none; ``peak``: what it takes.

    ``too_much``: the first that does not fit and what it takes or is expected to take, None for memory that ran out;
    None where everything fits.
    """

    rows: int
    peak: int
    too_much: tuple[int, int | None] | None = None


@dataclass
class Trend:
    """What has been measured so far, and what more rows would take."""

    seen: list[tuple[int, Usage]] = field(default_factory=list)

    def expected(self, rows: int) -> int:
        """Bytes at a larger number of rows than any seen.

        Each row more costs what the last ones did. With few rows the highest point is not where activations are (it is
        in the optimizer's step, say), and rows seem to cost nothing there: so it is no less than a row's share of
        what the forward passes add.
        """
        last, usage = self.seen[-1]
        per_row = usage.forward / last
        if len(self.seen) > 1:
            before, less = self.seen[-2]
            per_row = max(per_row, (usage.peak - less.peak) / (last - before))
        return usage.peak + math.ceil(per_row * (rows - last))


def candidates(recipe: Recipe) -> list[int]:
    """Micro batches that divide a worker's rows in every stage, smallest first."""
    workers = recipe.cluster.workers
    return divisors(math.gcd(*(stage.global_batch // workers for stage in stages_of(recipe, []))))


def climb(sizes: Sequence[int], measure: Callable[[int], Usage | None], room: int) -> Search:
    """The largest of ``sizes`` whose step takes no more than ``room`` bytes.

    ``measure`` tries a number of rows and gives None where memory ran out. Sizes are tried from the smallest up, each
    only if those before let expect that it fits: on a CPU the kernel kills who takes too much. Two rows are tried in
    any case, for what a row costs.
    """
    trend, best = Trend(), Search(0, 0)
    for rows in sorted({*sizes, *([2] if sizes[-1] > 2 else [])}):
        if trend.seen and (expected := trend.expected(rows)) > room:
            return Search(best.rows, best.peak, (rows, expected))
        usage = measure(rows)
        if usage is None or usage.peak > room:
            return Search(best.rows, best.peak, (rows, None if usage is None else usage.peak))
        trend.seen.append((rows, usage))
        if rows in sizes:
            best = Search(rows, usage.peak)
    return best


def usable(memory: int) -> int:
    """Bytes of ``memory`` that a trial or an estimate may fill."""
    return int(memory * (1 - KEPT_FREE))


def with_micro_batch(recipe: Recipe, rows: int) -> Recipe:
    """The recipe with this number written out."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": rows})})
