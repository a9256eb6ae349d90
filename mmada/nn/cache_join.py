"""How rows of several caches become one: what every part of a layer's state is told.

# N rows of the joint cache, in the order in which they are named until a plan arranges them, M some of them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# Parts of one kind (None: not there yet), and which of each one's rows are taken, by number; a row may come twice.
Pieces = Sequence[tuple[Any, Tensor]]


@dataclass(frozen=True)
class JoinPlan:
    """``shortest``, ``longest``: tokens of these rows of the joint cache. ``spare_columns``: that keys and values shall
    have. ``order_N``: the row that stands at each place; None: as they are named. ``moved``: rows (M,) of the first
    piece and the places (M,) they go to, where its room may be taken over and all others of it stay; None: it may not.
    """

    shortest: int
    longest: int
    spare_columns: int = 0
    order_N: Tensor | None = None
    moved: tuple[Tensor, Tensor] | None = None

    @cached_property
    def places_N(self) -> Tensor:
        """The place of each row."""
        assert self.order_N is not None
        return self.order_N.argsort()

    def arranged(self, rows: Tensor) -> Tensor:
        """Rows (N, ...) as they are named, at their places."""
        return rows if self.order_N is None else rows.index_select(0, self.order_N.to(rows.device))

    def write(self, into: Tensor, first: int, rows: Tensor) -> None:
        """Copy ``rows``, of which the first is the row number ``first``, to their places in ``into`` (N, ...)."""
        if self.order_N is None:
            into[first : first + len(rows)].copy_(rows)
        else:
            into.index_copy_(0, self.places_N[first : first + len(rows)].to(into.device), rows)


def fewest_moves(kept: Sequence[int], num_new: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Where rows go when ``kept`` (ascending) of a cache stay and ``num_new`` come: rows stay where they are if there
    is such a place, the others fill the gaps.

    Returns the row at each place, kept ones being numbered first, and the kept rows that move, each with its place.
    """
    num_rows = len(kept) + num_new
    order, homeless = [-1] * num_rows, []
    for number, row in enumerate(kept):
        if row < num_rows:
            order[row] = number
        else:
            homeless.append(number)
    others = iter([*homeless, *range(len(kept), num_rows)])
    order = [next(others) if number < 0 else number for number in order]
    moved = [(kept[number], place) for place, number in enumerate(order) if number < len(kept)]
    return order, [(row, place) for row, place in moved if row != place]


def padded_alike(rows: list[Tensor]) -> list[Tensor]:
    """Tensors (N, ...) of one number of dimensions, each filled up with 0 behind, in all but the first, to be alike."""
    shape = [max(sizes) for sizes in zip(*(each.shape[1:] for each in rows), strict=True)]
    padded = []
    for each in rows:
        missing = [wanted - size for wanted, size in zip(shape, each.shape[1:], strict=True)]
        behind = [amount for size in reversed(missing) for amount in (0, size)]
        padded.append(pad(each, behind) if any(missing) else each)
    return padded


def take_rows(kept: Tensor, rows_N: Tensor) -> Tensor:
    """The rows of a tensor (B, ...) by number."""
    return kept.index_select(0, rows_N.to(kept.device))


def numbers(values: Sequence[int], like: Tensor) -> Tensor:
    """Whole numbers on the device of ``like``."""
    return torch.tensor(values, dtype=torch.long, device=like.device)
