"""Attention among the experts that one token goes through: each hears what the others found before they are blended.

# T tokens, K active experts of a token, D model, H heads, C channels of a head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init


class CrossExpertAttention(nn.Module):
    """Z + MHA(LayerNorm Z) over the expert axis; (..., K, D) to (..., K, D).

    Only a token's active experts attend to each other: with all E of them the layer would not be sparse any more.
    Experts have no order, so there are no positions. The output projection starts at zero, and with it the layer as
    the identity.
    Raises ValueError where ``num_heads`` does not divide ``hidden_size``.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide hidden_size={hidden_size}; use one that does")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.o_proj.weight)

    def init_own_weights(self, config: Any) -> None:
        init.zeros_(self.o_proj.weight)

    def forward(self, outputs_TKD: Tensor) -> Tensor:
        normed = self.norm(outputs_TKD)
        query, key, value = (
            proj(normed).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Written out: fused kernels count the batch, which here is every token, in an index of 16 bits.
        scores_THKK = torch.einsum("...khc,...lhc->...hkl", query, key) * query.shape[-1] ** -0.5
        weights = scores_THKK.softmax(dim=-1, dtype=torch.promote_types(scores_THKK.dtype, torch.float32))
        mixed_TKHC = torch.einsum("...hkl,...lhc->...khc", weights.to(value.dtype), value)
        return outputs_TKD + self.o_proj(mixed_TKHC.flatten(-2))


def blend(outputs_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Σ_k w_k Z_k, (..., K, D) and (..., K) to (..., D); summed in float32 at least."""
    dtype = torch.promote_types(outputs_TKD.dtype, torch.float32)
    return (outputs_TKD.to(dtype) * weights_TK[..., None].to(dtype)).sum(dim=-2).to(outputs_TKD.dtype)
