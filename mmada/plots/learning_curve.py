"""The learning curve of a run."""

from __future__ import annotations

import math

from matplotlib.figure import Figure


def learning_curve(loss: list[tuple[int, float]], held_out: list[tuple[int, float]], title: str) -> Figure:
    """Training loss per step (as bits per token) and held-out bits per byte, over steps.

    ``loss`` is in nats per token; both are lists of (step, value).
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if loss:
        steps, nats = zip(*loss, strict=True)
        axes.plot(steps, [n / math.log(2) for n in nats], linewidth=0.8, alpha=0.6, label="training, bits per token")
    if held_out:
        steps, bits = zip(*held_out, strict=True)
        axes.plot(steps, bits, marker="o", markersize=3, label="held out, bits per byte")
    axes.set(title=title, xlabel="step", ylabel="bits")
    axes.grid(alpha=0.3)
    if loss or held_out:
        axes.legend()
    return figure
