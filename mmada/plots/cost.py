"""What the parts of a model cost, and what the model costs without each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def cost_figure(
    parts: Mapping[str, Mapping[str, float]], without: Mapping[str, Mapping[str, float]], title: str
) -> Figure:
    """Bars of each measure over the parts, and over the models without one part.

    ``parts``: measures by name (with their unit) for each part. ``without``: measures as multiples of the full
    model's. Every row of one of them has the same measures.
    """
    from matplotlib.figure import Figure

    panels = [(parts, "C0", None), (without, "C1", 1.0)]
    heights = [1.5 + len(rows) for rows, _, _ in panels]
    most = max(len(next(iter(rows.values()), {})) for rows, _, _ in panels)
    figure = Figure(figsize=(3.5 * most + 2, 0.3 * sum(heights) + 1), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(2, most, squeeze=False, height_ratios=heights)
    for row_of_axes, (rows, colour, mark) in zip(grid, panels, strict=True):
        measures = list(next(iter(rows.values()), {}))
        for column, axes in enumerate(row_of_axes):
            if column >= len(measures):
                axes.set_axis_off()
                continue
            bars(axes, list(rows), [rows[name][measures[column]] for name in rows], colour, mark)
            axes.set_xlabel(measures[column])
            if column:
                axes.set_yticklabels([])
    return figure


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], colour: str, mark: float | None) -> None:
    """Horizontal bars, the first on top; a line at ``mark``."""
    axes.barh(range(len(names)), values, color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    if mark is not None:
        axes.axvline(mark, color="black", linewidth=0.8)
