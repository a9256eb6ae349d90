"""Where a token stands: rotary positions.

# B batch, T tokens, H heads, K head_dim
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmada.config import MMaDAConfig


def rotary_frequencies(config: MMaDAConfig, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Angles per position for each rotated pair, shape (K/2,), float32, and the factor on cos and sin.

    Linear, NTK, YaRN and the other scalings are those of transformers, chosen by
    ``rope_parameters["rope_type"]`` (RoFormer, arXiv:2104.09864; YaRN, arXiv:2309.00071).
    """
    parameters = config.rope_parameters or {}
    if parameters.get("rope_type", "default") != "default":
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device)
    pair_K = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    return 1.0 / (parameters["rope_theta"] ** (pair_K / config.head_dim)), 1.0


def rotary_cos_sin(config: MMaDAConfig, position_ids_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (B, T, K).

    Recomputed in float32 at every forward instead of kept in a buffer: half-precision engines cast
    buffers, and rounded frequencies turn far positions by visibly wrong angles.
    """
    inverse_K, factor = rotary_frequencies(config, position_ids_BT.device)
    angles_BTK = position_ids_BT[..., None].float() * inverse_K
    angles_BTK = torch.cat((angles_BTK, angles_BTK), dim=-1)
    return (angles_BTK.cos() * factor).to(dtype), (angles_BTK.sin() * factor).to(dtype)


def rotate(states_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of queries or keys by their position's angle (transformers' layout)."""
    first, second = states_BHTK.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states_BHTK * cos_BTK[:, None] + turned * sin_BTK[:, None]
