"""What ``mmada bench attention`` runs: kernels on projected states, and caches of whole models.

# B batch, T tokens, H query heads, G key/value heads, K head_dim
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from jobs.bench.counting import count_kept
from mmada.config import MMaDAConfig
from mmada.model import MMaDAModel
from mmada.nn.attention.attend import attend
from mmada.nn.attention.scoring import Scoring
from mmada.nn.cache import MMaDACache
from mmada.nn.masks import Visibility


@dataclass(frozen=True)
class Heads:
    """Numbers and width of heads."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Of a token's queries, keys and values side by side."""
        return (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim

    def split(self, states_BTX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, K), keys and values (B, G, T, K)."""
        states = states_BTX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        groups = self.num_key_value_heads
        query, key, value = states.split([self.num_heads, groups, groups], dim=1)
        return query, key, value


class Kernel(nn.Module):
    """One of our kernels, causal, with a window or without: (B, T, X) to (B, T, H, K)."""

    def __init__(self, heads: Heads, kernel: str, window: int | None = None) -> None:
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.window: Any = window
        self.num_key_value_groups = heads.num_heads // heads.num_key_value_heads
        self.is_causal = True

    def forward(self, states_BTX: Tensor) -> Tensor:
        length = states_BTX.shape[1]
        positions = torch.arange(length, device=states_BTX.device)[None]
        visibility = Visibility(query_BT=positions, num_keys=length, window=self.window)
        scoring = Scoring(scaling=self.heads.head_dim**-0.5)
        query, key, value = self.heads.split(states_BTX)
        return attend(self, self.kernel, query, key, value, visibility, scoring, want_weights=False)[0]


class MaskedSDPA(nn.Module):
    """torch's fused kernel with the window as a mask of all pairs, made once: (B, T, X) to (B, H, T, K)."""

    def __init__(self, heads: Heads, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.mask_TT = cache(lambda length: window_mask(length, window))

    def forward(self, states_BTX: Tensor) -> Tensor:
        query, key, value = self.heads.split(states_BTX)
        return scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask_TT(states_BTX.shape[1]), enable_gqa=True
        )


def window_mask(length: int, window: int) -> Tensor:
    """True where 0 <= query - key < window."""
    distance_TT = torch.arange(length)[:, None] - torch.arange(length)
    return (distance_TT >= 0) & (distance_TT < window)


def saved_bytes(kernel: nn.Module, width: int, length: int) -> int:
    """What a kernel keeps for its backward pass of one row, the projected states among them."""
    states_BTX = torch.randn(1, length, width, requires_grad=True)
    return count_kept(lambda: kernel(states_BTX))[0].saved


def cache_bytes(length: int, **settings: Any) -> int:
    """Bytes of the cache of a model that has read one row of so many tokens."""
    config = MMaDAConfig(max_position_embeddings=length, **settings)
    model = MMaDAModel._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    with torch.no_grad():
        kept = model(torch.zeros(1, length, dtype=torch.long) + 8, use_cache=True).past_key_values
    assert isinstance(kept, MMaDACache)
    return kept.num_bytes()
