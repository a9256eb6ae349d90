"""The plain formula of attention, with its weights: the reference of every other kernel.

# B batch, T queries, S keys, H query heads, G key/value heads, K head_dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmada.nn.sparsemax import sparsemax


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    normalizer: str = "softmax",
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """normalizer(cap(q kᵀ s) + mask) v and its weights; the signature of transformers' interface.

    query (B, H, T, K); key, value (B, G, S, K); ``attention_mask`` (B, H, T, S) or broadcast to it: true where a
    key is seen, or numbers that are added; None is causality. Returns (B, T, H, K) and (B, H, T, S).
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores_BHTS = query @ key.transpose(2, 3) * scaling
    wide = torch.promote_types(scores_BHTS.dtype, torch.float32)
    if softcap is not None:  # Gemma 2, arXiv:2408.00118, section 2
        scores_BHTS = softcap * torch.tanh(scores_BHTS.to(wide) / softcap)
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores_BHTS = scores_BHTS.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    if normalizer == "sparsemax":
        weights_BHTS = sparsemax(scores_BHTS.to(wide)).to(query.dtype)
    else:
        weights_BHTS = scores_BHTS.softmax(dim=-1, dtype=wide).to(query.dtype)
    weights_BHTS = nn.functional.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ value).transpose(1, 2).contiguous(), weights_BHTS
