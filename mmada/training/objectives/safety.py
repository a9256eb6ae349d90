"""Staying near a model that is trusted: the divergence from it, with a fixed price or one that follows a limit.

The source's own term, the sum of all squared weights, is weight decay under another name; it is reported.

# N tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def divergence(logits_NV: Tensor, reference_logits_NV: Tensor) -> Tensor:
    """KL(model ‖ reference), exact over the vocabulary, nats, the sum over tokens; a scalar, 0 of no tokens."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    reference_NV = reference_logits_NV.float().log_softmax(dim=-1)
    return (logprobs_NV.exp() * (logprobs_NV - reference_NV)).sum()


def lagrangian(cost: Tensor, limit: float, multiplier: float) -> Tensor:
    """λ (cost - limit): what is added to a loss under the constraint cost <= limit; a scalar."""
    return multiplier * (cost - limit)


@torch.no_grad()
def squared_weights(parameters: Iterable[Tensor]) -> Tensor:
    """Σ ‖θ‖² of the tensors at hand; a scalar. For reading alone."""
    return torch.stack([parameter.detach().float().square().sum() for parameter in parameters]).sum()
