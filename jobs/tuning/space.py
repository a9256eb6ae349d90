"""From ``tune.space`` to numbers that a search draws, and back to keys of a recipe.

A search knows plain dimensions only. A point of a simplex is drawn as one number in (0, 1) for each of its names:
minus their logarithms, divided by their sum, are spread evenly over the simplex (Dirichlet with ones), so every kind
of search can walk in it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.search import Dimension
from jobs.recipe_schema_tune import DistributionSection

_SHARE = "#"  # key#name: the number drawn for one name of a simplex
_SMALLEST = 1e-6  # of these numbers: its logarithm is finite, and so is one minus it


def kind_of(section: DistributionSection) -> str:
    """Which distribution it is; one that has been checked has exactly one."""
    return next(name for name in DISTRIBUTIONS if getattr(section, name) is not None)


DISTRIBUTIONS = ("uniform", "loguniform", "quniform", "randint", "choice", "simplex")


def dimensions(space: Mapping[str, DistributionSection], *, grid: bool = False) -> dict[str, Dimension]:
    """What the search draws, by name. ``grid``: every dimension as the list of its values."""
    found: dict[str, Dimension] = {}
    for key, section in space.items():
        kind = kind_of(section)
        if grid:
            found[key] = Dimension("choice", options=tuple(grid_values(section)))
        elif kind == "simplex":
            assert section.simplex is not None
            for name in section.simplex:
                found[f"{key}{_SHARE}{name}"] = Dimension("uniform", _SMALLEST, 1 - _SMALLEST)
        elif kind == "choice":
            assert section.choice is not None
            found[key] = Dimension("choice", options=tuple(section.choice))
        else:
            low, high, *step = getattr(section, kind)
            found[key] = Dimension(kind, low, high, step[0] if step else None)
    return found


def grid_values(section: DistributionSection) -> list[Any]:
    """All values of a distribution that has finitely many; a simplex's as lists in the order of its names."""
    kind = kind_of(section)
    if kind == "choice":
        return list(section.choice or ())
    if kind == "randint":
        first, last = section.randint or (0, 0)
        return list(range(first, last + 1))
    if kind == "quniform":
        low, high, step = section.quniform or (0, 0, 1)
        return [_on_step(low + index * step, step) for index in range(math.floor((high - low) / step + 1e-9) + 1)]
    if kind == "simplex" and section.step is not None:
        return [list(point) for point in _lattice(section)]
    raise ValueError(f"{kind} has no list of values")


def count_grid(section: DistributionSection) -> int | None:
    """How many values that would be; None where there is no end of them."""
    kind = kind_of(section)
    if kind in ("uniform", "loguniform") or (kind == "simplex" and section.step is None):
        return None
    if kind == "simplex":
        parts, names = round(_total(section) / (section.step or 1)), len(section.simplex or ())
        return math.comb(parts - 1, names - 1)
    return len(grid_values(section))


def settings_of(space: Mapping[str, DistributionSection], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's keys with their values, for numbers that a search has drawn."""
    found: dict[str, Any] = {}
    for key, section in space.items():
        kind = kind_of(section)
        if kind == "simplex":
            names = section.simplex or []
            if key in drawn:  # a grid's point
                shares = list(drawn[key])
            else:
                shares = simplex_point(section, [drawn[f"{key}{_SHARE}{name}"] for name in names])
            found |= _placed(key, dict(zip(names, shares, strict=True)))
        elif kind == "quniform":
            low, high, step = section.quniform or (0, 0, 1)
            whole = all(float(each).is_integer() for each in (low, high, step))
            value = _on_step(drawn[key], step)
            found[key] = int(value) if whole else float(value)
        elif kind == "randint":
            found[key] = int(drawn[key])
        else:
            found[key] = drawn[key]
    return found


def simplex_point(section: DistributionSection, numbers: list[float]) -> list[Any]:
    """Positive values that sum to the total, of numbers in (0, 1); on multiples of the step where there is one."""
    weights = [-math.log(min(max(number, _SMALLEST), 1 - _SMALLEST)) for number in numbers]
    total = _total(section)
    shares = [total * weight / sum(weights) for weight in weights]
    if section.step is None:
        return shares
    # Every name gets one step; the others go by the largest remainder, so that the sum is exact.
    parts = round(total / section.step)
    wanted = [share / total * (parts - len(shares)) for share in shares]
    counts = [math.floor(each) for each in wanted]
    by_remainder = sorted(range(len(shares)), key=lambda index: (counts[index] - wanted[index], index))
    for index in by_remainder[: parts - len(shares) - sum(counts)]:
        counts[index] += 1
    return _on_lattice(section, [1 + count for count in counts])


def corners(space: Mapping[str, DistributionSection]) -> Iterator[dict[str, Any]]:
    """Settings at the edges: all keys at one end and at the other, then each key's every end with the rest at one."""
    ends = {key: _ends(key, section) for key, section in space.items()}
    first = {name: value for key in ends for name, value in ends[key][0].items()}
    yield first
    yield {name: value for key in ends for name, value in ends[key][-1].items()}
    for values in ends.values():
        for value in values[1:]:
            yield {**first, **value}


def shown_key(key: str) -> str:
    """A drawn number's name for people: the recipe's key, or the name in a simplex behind it."""
    return key.replace(_SHARE, " of ")


def _ends(key: str, section: DistributionSection) -> list[dict[str, Any]]:
    kind = kind_of(section)
    if kind == "choice":
        return [{key: value} for value in section.choice or ()]
    if kind == "simplex":
        names = section.simplex or []
        extremes = [[0.5 if other != name else 1e-4 for other in names] for name in names]
        return [_placed(key, dict(zip(names, simplex_point(section, each), strict=True))) for each in extremes]
    low, high = getattr(section, kind)[:2]
    return [settings_of({key: section}, {key: value}) for value in (low, high)]


def _placed(key: str, values: dict[str, Any]) -> dict[str, Any]:
    """One key with a section, or a key for each name in place of a star."""
    if "*" not in key.split("."):
        return {key: values}
    return {".".join(name if part == "*" else part for part in key.split(".")): each for name, each in values.items()}


def _total(section: DistributionSection) -> float:
    return 1.0 if section.total is None else section.total


def _lattice(section: DistributionSection) -> Iterator[list[Any]]:
    """Every way of cutting the total into positive multiples of the step, one for each name."""
    parts, names = round(_total(section) / (section.step or 1)), len(section.simplex or ())
    for cuts in itertools.combinations(range(1, parts), names - 1):
        edges = (0, *cuts, parts)
        yield _on_lattice(section, [after - before for before, after in itertools.pairwise(edges)])


def _on_lattice(section: DistributionSection, counts: list[int]) -> list[Any]:
    step = section.step or 1.0
    if step.is_integer() and _total(section).is_integer():
        return [int(step) * count for count in counts]
    return [_on_step(count * step, step) for count in counts]


def _on_step(value: float, step: float) -> Any:
    """The nearest multiple of the step, without the dust of binary fractions."""
    return float(f"{round(value / step) * step:.12g}")
