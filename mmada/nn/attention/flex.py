"""Attention by torch's flex_attention, which makes one CUDA kernel of our rules and skips what they hide.

# B batch, T queries, S keys, H query heads, G key/value heads, K head_dim
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mmada.nn.attention.scoring import Scoring
from mmada.nn.masks import Visibility


def flex(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scoring: Scoring) -> Tensor:
    """query (B, H, T, K); key, value (B, G, S, K). Returns (B, T, H, K). Without dropout and sparsemax.

    Raises ValueError on a CPU where a gradient is wanted, which torch cannot give there.
    """
    tensors = [query, key, value] + ([] if scoring.bias_HN is None else [scoring.bias_HN])
    on_cpu = query.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "attn_implementation=flex_attention has no gradient on a CPU; use blockwise or sdpa, or torch.no_grad()"
        )
    batch = query.shape[0]
    attend: Any = flex_attention if on_cpu else _compiled()
    mixed_BHTK = attend(
        query,
        key,
        value,
        score_mod=_score_rule(visibility, scoring, batch),
        block_mask=visibility.once("flex", lambda: _block_mask(visibility, batch)),
        scale=scoring.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return mixed_BHTK.transpose(1, 2)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _block_mask(visibility: Visibility, batch: int) -> BlockMask:
    query_BT, documents_BT = visibility.query_BT.expand(batch, -1), visibility.documents_BT
    skipped, offset, pattern = visibility.num_persistent, visibility.offset, visibility.pattern
    if pattern is not None:
        chosen_QN = visibility.chosen_blocks
        query_block_BT, key_block_BS = (
            blocks.expand(batch, -1) for blocks in (visibility.query_blocks, visibility.key_blocks)
        )

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, column = query_BT[b, q], (k - skipped).clamp(min=0)
        number = column + offset
        visible = number <= query
        if visibility.window is not None:
            visible = visible & (number > query - visibility.window)
        if documents_BT is not None:
            visible = visible & (documents_BT[b, q] == documents_BT[b, column])
        if pattern is not None:
            visible = visible & chosen_QN[query_block_BT[b, q], key_block_BS[b, k]]
        return visible | (k < skipped)

    rows_agree = visibility.query_BT.shape[0] == 1 and documents_BT is None
    return create_block_mask(
        seen,
        None if rows_agree else batch,
        None,
        visibility.num_queries,
        visibility.num_keys,
        device=str(query_BT.device),
    )


def _score_rule(visibility: Visibility, scoring: Scoring, batch: int) -> Callable[..., Tensor] | None:
    """Cap and bias; None without both."""
    softcap, bias_HN, query_BT = scoring.softcap, scoring.bias_HN, visibility.query_BT.expand(batch, -1)
    skipped, offset = visibility.num_persistent, visibility.offset
    if softcap is None and bias_HN is None:
        return None

    def rule(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias_HN is not None:
            distance = (query_BT[b, q] - (k - skipped + offset)).clamp(0, bias_HN.shape[1] - 1)
            score = score + torch.where(k < skipped, 0.0, bias_HN[h, distance]).to(score.dtype)
        return score

    return rule
