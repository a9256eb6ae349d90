"""From queries, keys and values to mixed values, by the kernel that was chosen.

Kernels are of two kinds. *Dense* ones have the signature of transformers' attention interface and get a mask: of the
whole (T, S) scores, or of the tiles into which ``banded`` and ``block_sparse`` cut them, so that time and memory grow
with T and not with its square. The others get the rule itself and skip what it hides.

# B batch, T queries, S keys, t and s of a tile, H query heads, G key/value heads, K head_dim, N distances
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmada.nn.attention.banded import band_size, banded
from mmada.nn.attention.block_sparse import block_sparse
from mmada.nn.attention.blockwise import QUERY_BLOCK, blockwise
from mmada.nn.attention.eager import eager_attention
from mmada.nn.attention.flex import flex
from mmada.nn.attention.scoring import Scoring
from mmada.nn.masks import Visibility, bias_at

RULE_KERNELS: dict[str, Callable[..., Tensor]] = {"blockwise": blockwise, "flex_attention": flex}


def attend(
    module: nn.Module,
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    scoring: Scoring,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """query (B, H, T, K); key, value (B, G, S, K). Returns (B, T, H, K), and (B, H, T, S) where the kernel knows them.

    ``kernel``: of ``choose_kernel``. ``want_weights``: go over all scores at once, where it is a dense one.
    """
    if kernel == "blockwise" and visibility.pattern is not None:
        # Its blocks are not those of the pattern; tiles of these are few and small.
        kernel = "sdpa" if scoring.softcap is None else "eager"
    if kernel in RULE_KERNELS:
        return RULE_KERNELS[kernel](query, key, value, visibility, scoring), None

    def tile(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, distance: Tensor) -> Tensor:
        """(·, H, t, K) and (·, G, s, K) to (·, t, H, K); persistent keys are not in ``seen`` and ``distance``."""
        persistent = key.shape[2] - seen.shape[3]
        mask = pad(seen, (persistent, 0), value=True) if persistent else seen
        if scoring.bias_HN is not None:
            num_distances = scoring.bias_HN.shape[1]
            distance = pad(distance.clamp(0, num_distances - 1), (persistent, 0), value=num_distances)
            mask = bias_at(scoring.bias_HN, distance).masked_fill(~mask, -torch.inf)
        return _dense(module, kernel, query, key, value, mask, scoring)[0]

    if not want_weights and visibility.pattern is not None:
        return block_sparse(tile, query, key, value, visibility), None
    if not want_weights and visibility.window is not None and query.shape[2] > band_size(visibility.window):
        return banded(tile, query, key, value, visibility), None
    if kernel == "sdpa" and scoring.bias_HN is not None and not scoring.dropout and query.shape[2] > QUERY_BLOCK:
        # With a bias sdpa keeps scores for its backward pass, or at least the bias at all of them.
        return blockwise(query, key, value, visibility, scoring), None
    mask = visibility.dense
    if scoring.bias_HN is not None:
        mask = visibility.bias(scoring.bias_HN).masked_fill(~visibility.mask(), -torch.inf)
    return _dense(module, kernel, query, key, value, mask, scoring)


def _dense(
    module: nn.Module, kernel: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    if kernel == "sdpa" and query.shape[2] == 1 and not torch.is_grad_enabled():
        return one_token(query, key, value, mask, scoring), None
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, eager_attention)
    if mask is not None and mask.is_floating_point() and interface is not eager_attention:
        mask = mask.to(query.dtype)
    extras: dict[str, object] = {}
    if scoring.softcap is not None:
        extras["softcap"] = scoring.softcap
    if scoring.normalizer != "softmax":
        extras["normalizer"] = scoring.normalizer
    return interface(module, query, key, value, mask, dropout=scoring.dropout, scaling=scoring.scaling, **extras)


def one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """What transformers' interface to SDPA makes of a single query in each row, without its questions: (B, 1, H, K).

    A group's query heads stand in one column of queries, so that keys and values need not be repeated for them.
    """
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    grouped_BGRK = query.reshape(batch, groups, heads // groups, width)
    if mask is not None:
        if mask.is_floating_point():
            mask = mask.to(query.dtype)
        if mask.shape[1] > 1:
            mask = mask.expand(-1, heads, -1, -1).reshape(mask.shape[0], groups, heads // groups, mask.shape[3])
    if heads > groups and query.device.type == "cpu" and query.dtype.itemsize >= 4:
        mixed_BGRK = by_products(grouped_BGRK, key, value, mask, scoring.scaling)
    else:
        mixed_BGRK = scaled_dot_product_attention(grouped_BGRK, key, value, attn_mask=mask, scale=scoring.scaling)
    return mixed_BGRK.reshape(batch, 1, heads, -1)


def by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """SDPA in three steps, for a few queries on a processor: its kernel there takes longer to begin than these do."""
    scores_BGRS = torch.matmul(query * scaling, key.transpose(2, 3))
    if mask is not None:
        scores_BGRS = scores_BGRS + mask if mask.is_floating_point() else scores_BGRS.masked_fill_(~mask, -torch.inf)
    return torch.matmul(scores_BGRS.softmax(dim=-1), value)
