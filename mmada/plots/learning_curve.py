"""The learning curve of a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_curve(
    loss: list[tuple[int, float]],
    held_out: list[tuple[int, float]],
    title: str,
    *,
    held_out_label: str = "held out, bits per byte",
) -> Figure:
    """Training loss per step (as bits per token) and a held-out figure in bits, over steps.

    ``loss`` is in nats per token; both are lists of (step, value).
    """
    in_bits = [(step, nats / math.log(2)) for step, nats in loss]
    return curves({"training, bits per token": in_bits}, {held_out_label: held_out}, title, "bits")


def curves(
    every_step: dict[str, list[tuple[int, float]]], now_and_then: dict[str, list[tuple[int, float]]], title: str, y: str
) -> Figure:
    """Metrics that every step has as thin lines, those of evaluations with a mark each; lists of (step, value)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in every_step.items():
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=0.8, alpha=0.6, label=label)
    for label, points in now_and_then.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(title=title, xlabel="step", ylabel=y)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure


def mark_stages(figure: Figure, starts: list[tuple[int, str]]) -> None:
    """Where each stage begins, a line with its name beside it; ``starts`` is a list of (first step, name)."""
    (axes,) = figure.axes
    for step, name in starts:
        axes.axvline(step, color="grey", linestyle=":", linewidth=0.8)
        top = axes.get_xaxis_transform()  # x in steps, y as a share of the height
        axes.text(step, 0.99, f" {name}", transform=top, rotation=90, va="top", fontsize=7, color="grey")
