"""The price of operations: what a model with gates is expected to spend on a token, and a hinge on it.

Time is no function that the graph knows, so it has no gradient; expected operations have one, through the gates'
probabilities. The source's own term, a hinge on measured time, is reported beside it.

# L gated layers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GateCost:
    """Operations per token of the two ways through a gated layer: ``open`` where the gate is 1, ``shut`` where 0."""

    open: float
    shut: float


def expected_cost(probabilities: Mapping[str, Tensor], costs: Mapping[str, GateCost]) -> Tensor:
    """C = Σ_l p_l · open_l + (1 - p_l) · shut_l over the layers, as a share of the most expensive way; a scalar.

    ``probabilities``: by layer, mean probability of its gate over tokens, scalars. Raises KeyError for a layer whose
    costs are not known.
    """
    most = sum(max(costs[name].open, costs[name].shut) for name in probabilities)
    terms = [
        probability * costs[name].open + (1 - probability) * costs[name].shut
        for name, probability in probabilities.items()
    ]
    return torch.stack(terms).sum() / most


def hinge(cost: Tensor, target: float) -> Tensor:
    """max(0, cost - target)², a scalar: nothing is gained below the target."""
    return (cost - target).clamp(min=0).square()


def time_hinge(seconds: Sequence[float], target: float) -> float:
    """E[max(0, T - T*)²]: the source's own speed term on measured times. It has no gradient; for reading alone."""
    return sum(max(0.0, each - target) ** 2 for each in seconds) / max(1, len(seconds))
