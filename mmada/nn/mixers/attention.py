"""Grouped-query attention with rotary positions.

# B batch, T tokens, D model, H query heads, G key/value heads, K head_dim, S keys in the cache
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmada.config import MMaDAConfig
from mmada.nn.attention.persistent import PersistentKeyValues
from mmada.nn.cache import MMaDACache
from mmada.nn.context import Context
from mmada.nn.masks import causal_mask
from mmada.nn.positions import rotate


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The plain formula, softmax(q kᵀ s + mask) v, with its weights; the signature of transformers' interface.

    query (B, H, T, K); key, value (B, G, S, K); returns (B, T, H, K) and (B, H, T, S).
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores_BHTS = query @ key.transpose(2, 3) * scaling
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~attention_mask, -torch.inf)
    wide = torch.promote_types(scores_BHTS.dtype, torch.float32)
    weights_BHTS = scores_BHTS.softmax(dim=-1, dtype=wide).to(query.dtype)
    weights_BHTS = nn.functional.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ value).transpose(1, 2).contiguous(), weights_BHTS


class Attention(nn.Module):
    """Query head i reads key/value head i // (H / G) (grouped-query attention, arXiv:2305.13245)."""

    def __init__(
        self,
        config: MMaDAConfig,
        layer_idx: int,
        kind: str = "attention",
        num_persistent: int = 0,
        state_name: str = "key_values",
    ) -> None:
        """``num_persistent`` learned keys and values in front; ``state_name``: of the part in the layer's cache."""
        super().__init__()
        self.config, self.layer_idx, self.kind = config, layer_idx, kind
        self.num_persistent, self.state_name = num_persistent, state_name
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=bias)
        self.persistent = PersistentKeyValues(config, num_persistent) if num_persistent else None

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: MMaDACache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mix (B, T, D) along T; keys and values join ``past_key_values`` where one is given.

        Returns the mixed states (B, T, D) and the weights, which only the eager kernel knows.
        """
        heads_BTHK = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads_BTHK).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads_BTHK).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads_BTHK).transpose(1, 2)
        if context.rotary is not None:
            query, key = rotate(query, *context.rotary), rotate(key, *context.rotary)
        offset = 0
        if past_key_values is not None:
            key, value, offset = (
                past_key_values.layers[self.layer_idx].key_values(self.state_name).append(key, value, context)
            )
        num_keys = key.shape[2]
        mask = context.once(
            ("causal", num_keys, offset), lambda: causal_mask(context, num_keys=num_keys, offset=offset)
        )
        if self.persistent is not None:
            key, value = self.persistent(key, value)
            if mask is None:
                mask = context.index_BT()[:, None, :, None] >= torch.arange(num_keys, device=context.device)
            mask = nn.functional.pad(mask, (self.num_persistent, 0), value=True)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed_BTHK, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return self.o_proj(mixed_BTHK.reshape(*hidden_states.shape[:-1], -1)), weights
