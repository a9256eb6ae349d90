"""Where a token stands: rotary positions, and biases by the distance between query and key.

# B batch, T tokens, H heads, K head_dim, N distances
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmada.config import MMaDAConfig


def rotary_frequencies(
    config: MMaDAConfig, device: torch.device | None = None, num_positions: int | None = None
) -> tuple[Tensor, float]:
    """Angles per position for each rotated pair, shape (K/2,), float32, and the factor on cos and sin.

    ``rope_parameters["rope_type"]`` chooses the scaling (RoFormer, arXiv:2104.09864): ``"ntk"`` raises the base, for
    good, so that the slowest pair is slowed by ``factor`` and the fastest keeps its speed; all others are those of
    transformers (YaRN, arXiv:2309.00071). ``num_positions`` is what ``"dynamic"`` and ``"longrope"`` depend on.
    """
    parameters = config.rope_parameters or {}
    kind, theta = parameters.get("rope_type", "default"), parameters["rope_theta"]
    if kind == "ntk":
        theta = theta * parameters["factor"] ** (config.head_dim / (config.head_dim - 2))
    elif kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=num_positions)
    pair_K = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    return 1.0 / (theta ** (pair_K / config.head_dim)), 1.0


def rotary_cos_sin(config: MMaDAConfig, position_ids_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (B, T, K).

    Recomputed in float32 at every forward instead of kept in a buffer: half-precision engines cast
    buffers, and rounded frequencies turn far positions by visibly wrong angles.
    """
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    # Keys in a cache keep the angles they came with, so decoding past the trained length is not one full pass here.
    num_positions = int(position_ids_BT.max()) + 1 if kind in ("dynamic", "longrope") else None
    inverse_K, factor = rotary_frequencies(config, position_ids_BT.device, num_positions)
    angles_BTK = position_ids_BT[..., None].float() * inverse_K
    angles_BTK = torch.cat((angles_BTK, angles_BTK), dim=-1)
    return (angles_BTK.cos() * factor).to(dtype), (angles_BTK.sin() * factor).to(dtype)


def rotate(states_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of queries or keys by their position's angle (transformers' layout)."""
    first, second = states_BHTK.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states_BHTK * cos_BTK[:, None] + turned * sin_BTK[:, None]


def rotate_both(query: Tensor, key: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """``rotate`` of queries (B, H, T, K) and of keys (B, G, T, K).

    In decoding the work is in the number of operations: the heads of both then go through them together.
    """
    if query.shape[2] > 1 or torch.is_grad_enabled():
        return rotate(query, cos_BTK, sin_BTK), rotate(key, cos_BTK, sin_BTK)
    heads = [query.shape[1], key.shape[1]]
    query, key = rotate(torch.cat([query, key], dim=1), cos_BTK, sin_BTK).split(heads, dim=1)
    return query, key


def alibi_slopes(num_heads: int) -> list[float]:
    """How fast each head's scores fall with distance (ALiBi, arXiv:2108.12409, section 3).

    2^(-8h/n) for n heads where n is a power of two; else those of the largest power of two below, then every other
    one of twice as many.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + [2.0 ** (-4 * (head + 1) / power) for head in range(0, 2 * (num_heads - power), 2)]


def alibi_bias(num_heads: int, num_distances: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-slope times distance for the distances 0 to N - 1, (H, N), in float32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    slopes_H1 = torch.tensor(alibi_slopes(num_heads), dtype=dtype, device=device)[:, None]
    return -slopes_H1 * torch.arange(num_distances, dtype=dtype, device=device)


def relative_bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of keys that far back (T5, arXiv:1910.10683, section 2.1, one-sided).

    Half of the buckets hold one distance each, the others grow with its logarithm up to ``max_distance``.
    """
    exact = num_buckets // 2
    grown = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    return torch.where(distance < exact, distance, (exact + grown.long()).clamp(max=num_buckets - 1))


class RelativeBias(nn.Module):
    """A learned number per head and bucket of distances."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__()
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.embedding = nn.Embedding(self.num_buckets, config.num_attention_heads)

    def forward(self, device: torch.device) -> Tensor:
        """The bias at the distances 0 to ``max_distance``, (H, N); all beyond have the last one's."""
        distance_N = torch.arange(self.max_distance + 1, device=device)
        return self.embedding(relative_bucket(distance_N, self.num_buckets, self.max_distance)).T
