"""Grouped-query attention of every kind: to all tokens, in a window, in windows by head, and block-sparse.

# B batch, T tokens, D model, H query heads, G key/value heads, K head_dim, S keys in the cache, N distances
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmada.config import MMaDAConfig
from mmada.nn.attention.attend import attend
from mmada.nn.attention.block_pattern import BlockPattern
from mmada.nn.attention.choice import choose_kernel
from mmada.nn.attention.persistent import PersistentKeyValues
from mmada.nn.attention.scoring import Scoring
from mmada.nn.cache import MMaDACache
from mmada.nn.context import Context
from mmada.nn.masks import Visibility
from mmada.nn.positions import RelativeBias, alibi_bias, rotate_both


@dataclass(frozen=True)
class HeadGroup:
    """Heads that see alike: ``heads`` of the queries, ``kv_heads`` that these read, their window and cache part."""

    heads: slice
    kv_heads: slice
    window: int | None
    state_name: str


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
        self.has_alibi = config.position_embedding_type == "alibi"
        self.is_causal = True
        self.groups = head_groups(config, kind, state_name)
        self.pattern = block_pattern(config, layer_idx) if kind == "sparse" else None
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.relative_bias = RelativeBias(config) if config.position_embedding_type == "relative" else None
        self.persistent = PersistentKeyValues(config, num_persistent) if num_persistent else None

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: MMaDACache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mix (B, T, D) along T; keys and values join ``past_key_values`` where one is given.

        Returns the mixed states (B, T, D) and the weights on tokens (B, H, T, S), which only the eager kernel knows.
        """
        heads_BTHK = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads_BTHK).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads_BTHK).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads_BTHK).transpose(1, 2)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if context.rotary is not None:
            query, key = rotate_both(query, key, *context.rotary)
        bias_HN = self._position_bias(context, query.dtype)
        mixed, weights, first_columns = [], [], []
        for group in self.groups:
            bias = None if bias_HN is None else bias_HN[group.heads]
            part, part_weights, offset = self._attend(
                group, query[:, group.heads], key[:, group.kv_heads], value[:, group.kv_heads], bias, context,
                past_key_values,
            )  # fmt: skip
            mixed.append(part)
            weights.append(part_weights)
            first_columns.append(offset)
        mixed_BTHK = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)
        output = self.o_proj(mixed_BTHK.reshape(*hidden_states.shape[:-1], -1))
        # Long rows of a window go by another way than those of a head that sees everything, and keep no weights.
        return output, None if any(part is None for part in weights) else join_weights(weights, first_columns)

    def _attend(
        self,
        group: HeadGroup,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias_HN: Tensor | None,
        context: Context,
        past_key_values: MMaDACache | None,
    ) -> tuple[Tensor, Tensor | None, int]:
        """The mixed heads of one group (B, T, H, K), their weights, and the token number of the weights' column 0."""
        offset = 0
        if past_key_values is not None:
            state = past_key_values.layers[self.layer_idx].key_values(group.state_name, group.window)
            key, value, offset = state.append(key, value, context)
        num_tokens = key.shape[2]
        visibility = context.once(
            ("visibility", num_tokens, offset, group.window, self.num_persistent, self.pattern),
            lambda: Visibility.of(context, num_tokens, offset, group.window, self.num_persistent, self.pattern),
        )
        if self.persistent is not None:
            key, value = self.persistent(key, value, group.kv_heads)
        kernel, scoring, want_weights = context.once(("kernel", id(self.config), self.training), self._choose)
        if bias_HN is not None:
            scoring = replace(scoring, bias_HN=bias_HN)
        mixed_BTHK, weights = attend(self, kernel, query, key, value, visibility, scoring, want_weights)
        return mixed_BTHK, None if weights is None else weights[..., self.num_persistent :], offset

    def _choose(self) -> tuple[str, Scoring, bool]:
        """What all layers of a config share in one forward pass: the kernel, what it computes, whether for weights."""
        config = self.config
        scoring = Scoring(
            scaling=self.scaling,
            softcap=config.attn_logit_softcapping,
            bias_HN=None,
            dropout=config.attention_dropout if self.training else 0.0,
            normalizer=config.attention_normalizer,
        )
        return choose_kernel(config, self.training), scoring, config._attn_implementation == "eager"

    def _position_bias(self, context: Context, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores at each distance (H, N), after any cap; None without such positions."""
        if self.relative_bias is not None:
            bias_HN = self.relative_bias(context.device)
            # "before": (q kᵀ + r) · scaling
            return bias_HN * self.scaling if self.config.relative_bias_scaling == "before" else bias_HN
        if self.has_alibi:
            heads, length = self.config.num_attention_heads, context.past + context.shape[1]
            return context.once(("alibi", heads), lambda: alibi_bias(heads, length, dtype, context.device))
        return None


def head_groups(config: MMaDAConfig, kind: str, state_name: str) -> list[HeadGroup]:
    """All heads as one group, or those of a ``multiscale`` layer in equal parts with a window each."""
    if kind != "multiscale":
        window = config.sliding_window if kind == "window" else None
        return [HeadGroup(slice(None), slice(None), window, state_name)]
    count = len(config.window_sizes)
    heads, kv_heads = config.num_attention_heads // count, config.num_key_value_heads // count
    return [
        HeadGroup(
            heads=slice(index * heads, (index + 1) * heads),
            kv_heads=slice(index * kv_heads, (index + 1) * kv_heads),
            window=None if window == -1 else window,
            state_name=f"{state_name}.{index}",
        )
        for index, window in enumerate(config.window_sizes)
    ]


def block_pattern(config: MMaDAConfig, layer_idx: int) -> BlockPattern:
    return BlockPattern(
        size=config.sparse_block_size,
        num_window=config.sparse_window_blocks,
        num_global=config.sparse_global_blocks,
        num_random=config.sparse_random_blocks,
        layer_idx=layer_idx,
    )


def join_weights(weights: list[Tensor], first_columns: list[int]) -> Tensor:
    """Weights of several groups (B, H, T, S) side by side; keys that a group has forgotten weigh 0 in it."""
    begin = min(first_columns)
    parts = [
        nn.functional.pad(part, (first - begin, 0)) if first > begin else part
        for part, first in zip(weights, first_columns, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
