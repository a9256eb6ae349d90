"""Attention block by block with a running softmax, so that the scores are never kept (FlashAttention-2, 2307.08691).

The forward pass keeps the output and one number per query, the logarithm of its softmax's denominator; the backward
pass computes the scores again. Blocks of keys that none of a block's queries sees are skipped.

# B batch, T queries, S keys, t and s of one block, H query heads, G key/value heads, K head_dim, N distances,
# R = H / G · t rows: the queries of one block that share a key/value head
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from mmada.nn.attention.scoring import Scoring
from mmada.nn.masks import Visibility

QUERY_BLOCK, KEY_BLOCK = 128, 256


def blockwise(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scoring: Scoring) -> Tensor:
    """query (B, H, T, K); key, value (B, G, S, K). Returns (B, T, H, K). Without dropout and sparsemax.

    Differentiable once. Computed in float32 at least. A query that sees no key gets zeros.
    """
    rule = _Rule(visibility, scoring.scaling, scoring.softcap)
    return _Blockwise.apply(query, key, value, scoring.bias_HN, rule).transpose(1, 2)


@dataclass(frozen=True)
class _Rule:
    """Everything that makes scores of products and is no tensor to be differentiated."""

    visibility: Visibility
    scaling: float
    softcap: float | None

    def query_blocks(self) -> Iterator[slice]:
        length = self.visibility.num_queries
        return (slice(begin, min(begin + QUERY_BLOCK, length)) for begin in range(0, length, QUERY_BLOCK))

    def key_blocks(self, queries: slice) -> Iterator[tuple[slice, Tensor | None]]:
        """The blocks that some of these queries see, with the mask (B or 1, 1, t, s) where not all see all."""
        visibility, total = self.visibility, self.visibility.num_keys
        for begin in range(0, total, KEY_BLOCK):
            keys = slice(begin, min(begin + KEY_BLOCK, total))
            covered = visibility.coverage(queries, keys)
            if covered is False:
                continue
            mask = None if covered else visibility.mask(queries, keys)
            if mask is None or visibility.documents_BT is None or bool(mask.any()):
                yield keys, mask

    def scores(
        self, query_BGRK: Tensor, key_BGsK: Tensor, bias_BHts: Tensor | None, mask_BHts: Tensor | None, num_queries: int
    ) -> tuple[Tensor, Tensor | None]:
        """Scores (B, G, R, s), and the derivative of the cap there, where there is one."""
        scores_BGRs = query_BGRK @ key_BGsK.transpose(2, 3) * self.scaling
        slope = None
        if self.softcap is not None:
            scores_BGRs = torch.tanh(scores_BGRs / self.softcap)
            slope = 1 - scores_BGRs**2
            scores_BGRs = scores_BGRs * self.softcap
        if bias_BHts is not None or mask_BHts is not None:
            scores_BHts = _by_head(scores_BGRs, num_queries)
            if bias_BHts is not None:
                scores_BHts = scores_BHts + bias_BHts
            if mask_BHts is not None:
                scores_BHts = scores_BHts.masked_fill(~mask_BHts, -torch.inf)
            scores_BGRs = _by_group(scores_BHts, query_BGRK.shape[1])
        return scores_BGRs, slope


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias_HN: Tensor | None, rule: _Rule) -> Tensor:
        mixed_BHTK = torch.empty_like(query)
        wide = torch.promote_types(query.dtype, torch.float32)
        log_sum_BHT = query.new_empty(query.shape[:-1], dtype=wide)
        with torch.autocast(query.device.type, enabled=False):
            for queries in rule.query_blocks():
                mixed_BHtK, log_sum_BHT[:, :, queries] = _mix(query, key, value, bias_HN, rule, queries)
                mixed_BHTK[:, :, queries] = mixed_BHtK.to(query.dtype)
        ctx.save_for_backward(query, key, value, bias_HN, mixed_BHTK, log_sum_BHT)
        ctx.rule = rule
        return mixed_BHTK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias_HN, mixed_BHTK, log_sum_BHT = ctx.saved_tensors
        rule, groups, wide = ctx.rule, key.shape[1], log_sum_BHT.dtype
        grad_query, grad_key, grad_value = (torch.zeros_like(each, dtype=wide) for each in (query, key, value))
        grad_bias = None
        if bias_HN is not None and ctx.needs_input_grad[3]:
            # One column more, for keys that are no tokens.
            grad_bias = bias_HN.new_zeros(bias_HN.shape[0], bias_HN.shape[1] + 1, dtype=wide)
        for queries in rule.query_blocks():
            count = queries.stop - queries.start
            rows = _by_group(query[:, :, queries].to(wide), groups)
            grad_rows = _by_group(grad_BHTK[:, :, queries].to(wide), groups)
            # D of eq. 4: what the softmax takes off every score's gradient.
            common = (grad_BHTK[:, :, queries].to(wide) * mixed_BHTK[:, :, queries]).sum(dim=-1, keepdim=True)
            common, log_sum = _by_group(common, groups), _by_group(log_sum_BHT[:, :, queries, None], groups)
            for keys, mask in rule.key_blocks(queries):
                key_s, value_s = key[:, :, keys].to(wide), value[:, :, keys].to(wide)
                bias = None if bias_HN is None else rule.visibility.bias(bias_HN.to(wide), queries, keys)
                scores, slope = rule.scores(rows, key_s, bias, mask, count)
                weights = torch.exp(scores - log_sum)
                grad_value[:, :, keys] += weights.transpose(2, 3) @ grad_rows
                grad_scores = weights * (grad_rows @ value_s.transpose(2, 3) - common)
                if grad_bias is not None:
                    distance = rule.visibility.distance(bias_HN.shape[1], queries, keys)
                    _add_by_distance(grad_bias, _by_head(grad_scores, count), distance)
                grad_scores = rule.scaling * (grad_scores if slope is None else grad_scores * slope)
                grad_query[:, :, queries] += _by_head(grad_scores @ key_s, count)
                grad_key[:, :, keys] += grad_scores.transpose(2, 3) @ rows
        if grad_bias is not None:
            grad_bias = grad_bias[:, :-1].to(bias_HN.dtype)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_bias, None


def _mix(
    query: Tensor, key: Tensor, value: Tensor, bias_HN: Tensor | None, rule: _Rule, queries: slice
) -> tuple[Tensor, Tensor]:
    """What one block of queries gathers (B, H, t, K), and the logarithms of its sums of exponentials (B, H, t)."""
    groups, count = key.shape[1], queries.stop - queries.start
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = _by_group(query[:, :, queries].to(wide), groups)
    mixed, total = torch.zeros_like(rows), rows.new_zeros(*rows.shape[:-1], 1)
    peak = torch.full_like(total, -torch.inf)
    for keys, mask in rule.key_blocks(queries):
        bias = None if bias_HN is None else rule.visibility.bias(bias_HN.to(wide), queries, keys)
        scores, _ = rule.scores(rows, key[:, :, keys].to(wide), bias, mask, count)
        new_peak = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
        base = new_peak.masked_fill(new_peak == -torch.inf, 0)  # nothing seen yet: exp(-inf - 0) = 0
        weights, kept = torch.exp(scores - base), torch.exp(peak - base)
        total = kept * total + weights.sum(dim=-1, keepdim=True)
        mixed = kept * mixed + weights @ value[:, :, keys].to(wide)
        peak = new_peak
    unseen = total == 0
    log_sum = (peak + total.log()).masked_fill(unseen, 0)
    return _by_head(mixed / total.masked_fill(unseen, 1), count), _by_head(log_sum, count)[..., 0]


def _by_group(states_BHtX: Tensor, groups: int) -> Tensor:
    """(B, H, t, ·) to (B, G, R, ·)."""
    return states_BHtX.unflatten(1, (groups, -1)).flatten(2, 3)


def _by_head(states_BGRX: Tensor, num_queries: int) -> Tensor:
    """(B, G, R, ·) to (B, H, t, ·)."""
    return states_BGRX.unflatten(2, (-1, num_queries)).flatten(1, 2)


def _add_by_distance(sums_HN: Tensor, grad_BHts: Tensor, distance_Bts: Tensor) -> None:
    if distance_Bts.shape[0] == 1:
        grad_BHts = grad_BHts.sum(dim=0, keepdim=True)
    sums_HN.index_add_(1, distance_Bts.flatten(), grad_BHts.transpose(0, 1).flatten(1))


def blockwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``blockwise`` for any model of transformers that asks for it by name; causal, without padding.

    Raises ValueError for a mask or dropout, which it does not take.
    """
    if attention_mask is not None or dropout:
        raise ValueError(
            f"attn_implementation=blockwise takes neither the mask of {type(module).__name__} nor dropout={dropout}; "
            "use sdpa"
        )
    total, length = key.shape[2], query.shape[2]
    visibility = Visibility(
        query_BT=torch.arange(total - length, total, device=query.device)[None],
        num_keys=total,
        past=total - length,
        window=sliding_window,
    )
    return blockwise(query, key, value, visibility, Scoring(scaling or query.shape[-1] ** -0.5, softcap)), None


AttentionInterface.register("blockwise", blockwise_attention)
# Else transformers would give other models no mask at all, where sdpa would get one.
AttentionMaskInterface.register("blockwise", sdpa_mask)
