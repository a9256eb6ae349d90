"""How the reward of a policy grew."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reward_curve(
    reward: list[tuple[int, float]], spread: list[tuple[int, float]], accuracy: list[tuple[int, float]], title: str
) -> Figure:
    """Mean reward of a batch with its standard deviation, and held-out accuracy, over iterations.

    All are lists of (iteration, value); ``spread`` is of the same iterations as ``reward``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if reward:
        steps, values = zip(*reward, strict=True)
        axes.plot(steps, values, linewidth=1, label="reward of a batch")
        low = [value - width for (_, value), (_, width) in zip(reward, spread, strict=True)]
        high = [value + width for (_, value), (_, width) in zip(reward, spread, strict=True)]
        axes.fill_between(steps, low, high, alpha=0.15, linewidth=0, label="± its standard deviation")
    if accuracy:
        steps, values = zip(*accuracy, strict=True)
        axes.plot(steps, values, marker="o", markersize=4, label="held-out accuracy")
    axes.set(title=title, xlabel="iteration", ylabel="reward")
    axes.grid(alpha=0.3)
    if reward or accuracy:
        axes.legend()
    return figure
