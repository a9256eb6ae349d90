"""Which rows make up a step's global batch: a pure function of (seed, step, how far each source has been read).

Every source is read in epochs, each a permutation of its own of all its rows. A step passes over the rows that are
not within the range of difficulty that is open then: they come in the next epoch, if they are within it by that time.
With one source and all of it open this is ``mmada.data.sampling.global_batch_indices``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmada.data.sampling import epoch_permutation, uniform_places


@dataclass(frozen=True)
class RowsOfSource:
    """A source's size, and how its rows compare in difficulty: ``share_N`` from 0 (easiest) to 1, in (0, 1); None
    where they are all alike."""

    num_rows: int
    share_N: np.ndarray | None = None


@dataclass(frozen=True)
class Draw:
    """The rows of a global batch in the order of its places: which source (its number) and which row of it, (B,)."""

    sources_B: np.ndarray
    rows_B: np.ndarray


def difficulty_shares(difficulty_N: np.ndarray) -> np.ndarray:
    """Difficulties as shares of all rows that are easier, (N,) in (0, 1); equally hard rows stand in their order.

    Competence is a quantile (arXiv:1903.09848, section 2): a model of competence c sees the easiest share c.
    """
    order = np.argsort(difficulty_N, kind="stable")
    shares_N = np.empty(len(order))
    shares_N[order] = (np.arange(len(order)) + 0.5) / len(order)
    return shares_N


def draw_batch(
    seed: int,
    step: int,
    global_batch: int,
    sources: Mapping[str, RowsOfSource],
    weights: Sequence[float],
    difficulty: tuple[float, float],
    drawn: Mapping[str, tuple[int, int]],
) -> tuple[Draw, dict[str, tuple[int, int]]]:
    """Draw the global batch of ``step``; and how far each source has been read after it, (epoch, place in it).

    ``weights``: of the sources in order, not negative, not all 0; a place of the batch is given to a source by a
    number that is a function of (seed, step, place). ``difficulty``: shares between which rows lie; of a source
    without difficulties all rows do.

    Raises:
        ValueError: weights that cannot be used, or a source with no row within the range.
    """
    weights_S = np.asarray(weights, dtype=np.float64)
    if len(weights_S) != len(sources) or (weights_S < 0).any() or not weights_S.sum() > 0:
        raise ValueError(f"weights={list(weights)} of {len(sources)} sources must not be negative or all 0")
    names = list(sources)
    if len(names) == 1:
        sources_B = np.zeros(global_batch, dtype=np.int64)
    else:
        edges_S = np.cumsum(weights_S) / weights_S.sum()
        chosen_B = np.searchsorted(edges_S, uniform_places(seed, step, global_batch), side="right")
        sources_B = np.minimum(chosen_B, np.flatnonzero(weights_S)[-1])
    rows_B, after = np.empty(global_batch, dtype=np.int64), dict(drawn)
    for number, name in enumerate(names):
        places = np.flatnonzero(sources_B == number)
        if not len(places):
            continue
        rows_B[places], after[name] = _read(
            _source_seed(seed, number), name, sources[name], difficulty, len(places), drawn.get(name, (0, 0))
        )
    return Draw(sources_B, rows_B), after


def _source_seed(seed: int, number: int) -> int:
    """The first source reads in the order of the run's own seed."""
    return (seed + number * 0x9E3779B97F4A7C15) % 2**64


def _read(
    seed: int, name: str, source: RowsOfSource, difficulty: tuple[float, float], count: int, at: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int]]:
    """The next ``count`` rows within the range, and how far the source has been read then."""
    epoch, place = at
    found: list[np.ndarray] = []
    open_N = _is_open(name, source, difficulty)
    while count:
        order_N = epoch_permutation(seed, epoch, source.num_rows)
        ahead = order_N[place:]
        here = np.arange(len(ahead)) if open_N is None else np.flatnonzero(open_N[ahead])
        taken = here[:count]
        found.append(ahead[taken])
        count -= len(taken)
        place = place + int(taken[-1]) + 1 if not count else source.num_rows
        if place == source.num_rows:
            epoch, place = epoch + 1, 0
    return np.concatenate(found), (epoch, place)


def _is_open(name: str, source: RowsOfSource, difficulty: tuple[float, float]) -> np.ndarray | None:
    low, high = difficulty
    if source.share_N is None or (low <= 0 and high >= 1):
        return None
    open_N = (source.share_N >= low) & (source.share_N <= high)
    if not open_N.any():  # a range narrower than the distance of two rows: the one that is nearest to it
        nearest: Any = np.abs(source.share_N - (low + high) / 2).argmin()
        open_N[nearest] = True
    return open_N
