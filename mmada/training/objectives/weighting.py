"""How several losses become one: fixed weights, learned uncertainty, gradient normalisation, projected conflicts.

Each way says what the losses of a step are multiplied with; their weighted sum is what is minimised, so any engine can
take its gradient. What a way learns is plain values, which a checkpoint holds.

Normalisation and projection look at the losses' gradients g_i over all parameters, but need no more of them than
their products ``gram_KK[i, j] = g_i · g_j``: a projected gradient is a sum of the g_i, with coefficients that follow
from the products alone.

# K losses
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Combination = Literal["fixed", "uncertainty", "gradnorm", "project"]
_NO_GRADIENT = 1e-12  # of the largest squared norm
NEEDS_GRADIENTS: tuple[Combination, ...] = ("gradnorm", "project")


@dataclass(frozen=True)
class WeightState:
    """What has been learned about the losses, by name.

    ``log_variances`` of ``uncertainty``, 0 at the start; ``scales`` of ``gradnorm``, 1 at the start; ``first``: the
    losses of its first step; ``multipliers`` of constraints, 0 at the start; ``kept``: by loss, whatever else it was
    measured with at first.
    """

    log_variances: Mapping[str, float] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    first: Mapping[str, float] = field(default_factory=dict)
    multipliers: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's metadata."""
        return asdict(self)


def uncertainty_weights(state: WeightState, names: Sequence[str]) -> dict[str, float]:
    """½ e^(-s_i) (Kendall et al., arXiv:1705.07115, eq. 7, with s_i = log σ_i²)."""
    return {name: 0.5 * math.exp(-state.log_variances.get(name, 0.0)) for name in names}


def after_uncertainty(state: WeightState, losses: Mapping[str, float], rate: float) -> WeightState:
    """One step of gradient descent on Σ ½ e^(-s_i) L_i + ½ s_i in the s_i."""
    old = state.log_variances
    learned = {
        name: old.get(name, 0.0) - rate * 0.5 * (1 - math.exp(-old.get(name, 0.0)) * loss)
        for name, loss in losses.items()
    }
    return replace(state, log_variances={**old, **learned})


def after_gradnorm(
    state: WeightState, losses: Mapping[str, float], norms: Mapping[str, float], *, alpha: float, rate: float
) -> WeightState:
    """One step of GradNorm (Chen et al., arXiv:1711.02257, algorithm 1); ``norms`` are of the unweighted gradients.

    The scales w_i go down the gradient of Σ |w_i G_i - mean(w G) · r_i^α|, the second term being a constant, where r_i
    is how much less than the mean loss i has fallen since the first step. They are brought back to a mean of 1.
    """
    first = state.first or dict(losses)
    scales = {name: state.scales.get(name, 1.0) for name in losses}
    fallen = {name: losses[name] / max(first.get(name, losses[name]), 1e-12) for name in losses}
    mean_fallen = sum(fallen.values()) / len(fallen)
    mean_norm = sum(scales[name] * norms[name] for name in losses) / len(losses)
    for name in losses:
        target = mean_norm * (fallen[name] / max(mean_fallen, 1e-12)) ** alpha
        sign = (scales[name] * norms[name] > target) - (scales[name] * norms[name] < target)
        scales[name] = max(1e-3, scales[name] - rate * sign * norms[name])
    total = sum(scales.values()) / len(scales)
    return replace(state, first=first, scales={name: value / total for name, value in scales.items()})


def projection_coefficients(gram_KK: Tensor, seed: int) -> Tensor:
    """What each loss is multiplied with so that the gradient of their sum is that of PCGrad, (K,) float64.

    Each g_i in turn loses its part along every other g_j that it runs against, in an order drawn from ``seed``:
    g_i ← g_i - (g_i · g_j / |g_j|²) g_j where g_i · g_j < 0 (Yu et al., arXiv:2001.06782, algorithm 1); g_j is the
    gradient as it was. The gradient is the sum of the g_i.
    """
    gram_KK = gram_KK.double()
    count = len(gram_KK)
    nothing = _NO_GRADIENT * float(gram_KK.diagonal().max())  # a loss that is constant has a gradient of rounding
    coefficients_KK = torch.eye(count, dtype=torch.float64)  # row i: the g_j that the projected g_i is made of
    shuffle = random.Random(seed)
    for i in range(count):
        others = [j for j in range(count) if j != i]
        shuffle.shuffle(others)
        for j in others:
            along = coefficients_KK[i] @ gram_KK[:, j]
            if along < 0 and gram_KK[j, j] > nothing:
                coefficients_KK[i, j] -= along / gram_KK[j, j]
    return coefficients_KK.sum(dim=0)


def after_constraint(state: WeightState, name: str, cost: float, limit: float, rate: float) -> WeightState:
    """λ ← max(0, λ + rate · (cost - limit)): ascent on the Lagrangian of loss + λ (cost - limit)."""
    grown = max(0.0, state.multipliers.get(name, 0.0) + rate * (cost - limit))
    return replace(state, multipliers={**state.multipliers, name: grown})


def scheduled(weight: float | tuple[float, float], share: float) -> float:
    """A weight that goes from one value to another in a straight line over a stage; ``share`` of the stage is done."""
    if isinstance(weight, tuple):
        return weight[0] + (weight[1] - weight[0]) * min(1.0, max(0.0, share))
    return weight
