"""What a search has seen: the objective over each setting, the trials' curves, and all settings side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

_COLUMNS = 3


def objective_figure(
    settings: Mapping[str, Sequence[Any]], values: Sequence[float], done: Sequence[bool], metric: str, best: int | None
) -> Figure:
    """The metric over each setting, a point for every trial; hollow where the trial was not run to its end.

    ``settings``: values by name, in the order of ``values``. ``best``: place of the best trial.
    """
    rows = -(-len(settings) // _COLUMNS)
    columns = min(_COLUMNS, len(settings))
    figure = Figure(figsize=(3.6 * columns + 0.6, 3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for index, axes in enumerate(grid.flat):
        if index >= len(settings):
            axes.set_axis_off()
            continue
        name, own = list(settings.items())[index]
        places, labels = _places(own)
        colours = ["C0" if is_done else "none" for is_done in done]
        axes.scatter(places, values, c=colours, edgecolors="C0", linewidths=1)
        if best is not None:
            axes.scatter([places[best]], [values[best]], marker="*", s=160, color="C3", zorder=3)
        _axis(axes, own, labels)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    for row in grid:
        row[0].set_ylabel(metric)
    return figure


def trial_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]], metric: str, title: str, best: str | None
) -> Figure:
    """The metric of every trial over its steps; the best one's line is thick."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        if points:
            is_best = name == best
            style: dict[str, Any] = {"linewidth": 2.5, "zorder": 3} if is_best else {"linewidth": 1.0, "alpha": 0.8}
            axes.plot(*zip(*points, strict=True), marker=".", label=f"{name}{' (best)' * is_best}", **style)
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if 0 < len(curves) <= 12:
        axes.legend(fontsize="small")
    return figure


def parallel_coordinates(
    settings: Mapping[str, Sequence[Any]], values: Sequence[float], metric: str, *, lower_is_better: bool
) -> Figure:
    """A line for every trial through its settings to the metric, coloured by it; each axis has its own scale."""
    axes_of = {**settings, metric: values}
    figure = Figure(figsize=(2 * len(axes_of) + 1.5, 4), layout="constrained")
    axes = figure.subplots()
    heights, ticks = zip(*(_heights(own) for own in axes_of.values()), strict=True)
    low, high = min(values), max(values)
    norm = Normalize(low, high if high > low else low + 1)
    colours = colormaps["viridis_r" if lower_is_better else "viridis"]
    order = sorted(range(len(values)), key=lambda index: values[index], reverse=lower_is_better)
    for index in order:  # the best on top
        line = [column[index] for column in heights]
        axes.plot(range(len(axes_of)), line, color=colours(norm(values[index])), linewidth=1.5)
    for place, marks in enumerate(ticks):
        axes.axvline(place, color="black", linewidth=0.8)
        for height, text in marks:
            axes.annotate(text, (place, height), xytext=(4, 0), textcoords="offset points", fontsize="x-small")
    axes.set_xticks(range(len(axes_of)), list(axes_of), rotation=20, ha="right", fontsize="small")
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(axes_of) - 0.5)
    return figure


def _places(values: Sequence[Any]) -> tuple[list[float], list[str] | None]:
    """Where values stand on an axis, and their names where they are no numbers."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return [float(value) for value in values], None
    names = sorted({str(value) for value in values})
    return [float(names.index(str(value))) for value in values], names


def _is_wide(values: Sequence[float]) -> bool:
    """Whether the values span so many powers of ten that a logarithmic axis shows them better."""
    return min(values) > 0 and max(values) / min(values) > 20


def _axis(axes: Axes, own: Sequence[Any], labels: list[str] | None) -> None:
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize="small")
    elif _is_wide([float(value) for value in own]):
        axes.set_xscale("log")


def _heights(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Values as heights from 0 to 1, and the marks of that axis."""
    places, labels = _places(values)
    scaled = np.log(places) if labels is None and _is_wide(places) else np.asarray(places)
    low, span = scaled.min(), max(float(np.ptp(scaled)), 1e-12)
    heights = ((scaled - low) / span).tolist() if np.ptp(scaled) else [0.5] * len(places)
    if labels is not None:
        marks = {height: str(value) for height, value in zip(heights, values, strict=True)}
    else:
        ends = {int(np.argmin(scaled)), int(np.argmax(scaled))}
        marks = {heights[index]: f"{places[index]:.4g}" for index in ends}
    return heights, sorted(marks.items())
