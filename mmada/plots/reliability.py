"""How often a model is right at each confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reliability(bins: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> Figure:
    """A line for each name, over bins of equal width; on the diagonal confidence means what it says.

    ``bins`` by name: ``count`` of predictions, and sums of their ``confidence`` and of those that were ``correct``, a
    number for each bin. Bins without predictions are left out; marks grow with the share of predictions.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
    for label, own in bins.items():
        total = sum(own["count"])
        filled = [
            (confidence / count, correct / count, 10 + 200 * count / total)
            for count, confidence, correct in zip(own["count"], own["confidence"], own["correct"], strict=True)
            if count > 0
        ]
        (line,) = axes.plot([x for x, _, _ in filled], [y for _, y, _ in filled], linewidth=0.8, label=label)
        axes.scatter(*zip(*filled, strict=True), color=line.get_color())
    axes.set(title=title, xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
