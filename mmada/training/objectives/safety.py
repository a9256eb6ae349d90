"""Staying near a model that is trusted: the divergence from it.

The source's own term, the sum of all squared weights, is weight decay under another name; it is reported.

# N tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def divergence(logits_NV: Tensor, reference_logits_NV: Tensor) -> Tensor:
    """KL(model ‖ reference), exact over the vocabulary, nats, the sum over tokens; a scalar, 0 of no tokens.

    In float32 at least.
    """
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    logprobs_NV = logits_NV.to(dtype).log_softmax(dim=-1)
    reference_NV = reference_logits_NV.to(dtype).log_softmax(dim=-1)
    return (logprobs_NV.exp() * (logprobs_NV - reference_NV)).sum()


@torch.no_grad()
def squared_weights(parameters: Iterable[Tensor]) -> Tensor:
    """Σ ‖θ‖² of the tensors at hand; a scalar. For reading alone."""
    return torch.stack([parameter.detach().float().square().sum() for parameter in parameters]).sum()
