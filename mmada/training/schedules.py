"""Learning rates: pure functions of the step, so that resuming needs no state, and one that answers to the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Kind = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "adaptive"]


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes from its peak to ``min_ratio`` of it.

    ``steps``: of the whole run; step 0 is the first and ``steps - 1`` the last. ``warmup_steps``: over which it rises
    in a straight line. ``decay_steps``: the last steps, over which ``wsd`` falls in a straight line.
    """

    peak: float
    steps: int
    warmup_steps: int = 0
    min_ratio: float = 0.0
    decay_steps: int = 0

    def rate(self, kind: Kind, step: int) -> float:
        """The learning rate of a step. ``adaptive`` stays at its peak: ``AdaptiveRate`` says what is left of it."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return self.peak * _SHAPES[kind](self, step)

    def progress(self, step: int) -> float:
        """The share of the way from the warm-up's end to the last step, from 0 to 1."""
        return min(1.0, (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps))


def _cosine(own: Schedule, step: int) -> float:
    return own.min_ratio + (1 - own.min_ratio) * 0.5 * (1 + math.cos(math.pi * own.progress(step)))


def _linear(own: Schedule, step: int) -> float:
    return 1 - (1 - own.min_ratio) * own.progress(step)


def _constant(own: Schedule, step: int) -> float:
    return 1.0


def _wsd(own: Schedule, step: int) -> float:
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395): at the peak until the last ``decay_steps``."""
    first = own.steps - own.decay_steps
    if step < first:
        return 1.0
    return 1 - (1 - own.min_ratio) * min(1.0, (step - first + 1) / max(1, own.decay_steps))


def _inverse_sqrt(own: Schedule, step: int) -> float:
    """1 / sqrt(step) from the warm-up's end on (arXiv:1706.03762, eq. 3), not below ``min_ratio``."""
    begin = max(1, own.warmup_steps)
    return max(own.min_ratio, math.sqrt(begin / max(begin, step + 1)))


_SHAPES: Mapping[str, Callable[[Schedule, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "adaptive": _constant,
}


def warmup_cosine(step: int, *, peak: float, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Learning rate of step ``step`` (0 is the first): linear to ``peak``, then a cosine to ``peak * min_ratio``.

    The first step already moves (peak / warmup_steps); the last step, ``steps - 1``, has the floor exactly.
    """
    return Schedule(peak, steps, warmup_steps, min_ratio).rate("cosine", step)


@dataclass(frozen=True)
class AdaptiveRate:
    """What an adaptive learning rate has come to: a factor on the peak, changed by what the run shows.

    It falls by ``decay`` after ``patience`` evaluations without a better loss, and is held back where gradients are
    mostly noise: the factor of a step is ``factor · min(1, target / noise)``, ``noise`` being the smoothed ratio of the
    gradient norm's spread to its mean. ``best``, ``stale``: as in a plateau; ``mean`` and ``square``: smoothed gradient
    norm and its square, both uncorrected, over ``count`` steps. Plain values for a checkpoint.
    """

    factor: float = 1.0
    best: float | None = None
    stale: int = 0
    mean: float = 0.0
    square: float = 0.0
    count: int = 0

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's metadata."""
        return asdict(self)

    @property
    def noise(self) -> float:
        """Standard deviation of the gradient's norm over its mean, both smoothed; 0 before there is any."""
        if self.count < 2:
            return 0.0
        correction = 1 - _SMOOTHING**self.count
        mean, square = self.mean / correction, self.square / correction
        return math.sqrt(max(0.0, square - mean * mean)) / max(mean, 1e-12)

    def after_step(self, gradient_norm: float) -> AdaptiveRate:
        """With one more gradient's norm."""
        return replace(
            self,
            mean=_SMOOTHING * self.mean + (1 - _SMOOTHING) * gradient_norm,
            square=_SMOOTHING * self.square + (1 - _SMOOTHING) * gradient_norm**2,
            count=self.count + 1,
        )

    def after_evaluation(self, loss: float, *, decay: float, patience: int, min_delta: float) -> AdaptiveRate:
        """With one more evaluation, of a metric that should fall."""
        if self.best is None or self.best - loss > min_delta:
            return replace(self, best=loss, stale=0)
        if self.stale + 1 < patience:
            return replace(self, stale=self.stale + 1)
        return replace(self, factor=self.factor * decay, stale=0)

    def scale(self, noise_target: float | None, least: float) -> float:
        """What the peak is multiplied with, not below ``least``."""
        noise = self.noise
        held = 1.0 if noise_target is None or noise <= noise_target else noise_target / noise
        return max(least, self.factor * held)


_SMOOTHING = 0.95
