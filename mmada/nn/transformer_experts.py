"""A mixture whose experts are small transformers: a noisy gate chooses some for every sequence, or for every token.

Only chosen experts are computed. An expert's attention sees those tokens of a sequence that chose it, as if the
others were not there; the same comes out of running every expert on all tokens with the others masked.
The experts are replicated on all workers, not spread over them.

# B batch, T tokens, D model, H heads, E experts, K chosen experts, R rows that chose an expert
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from mmada.nn.context import front_order, take_columns
from mmada.nn.cross_expert import CrossExpertAttention, blend
from mmada.nn.router import choose_experts, counter_normal
from mmada.training.objectives.router import importance, smooth_load, squared_coefficient_of_variation

# Apart from the router's noise, whose streams are the layers' numbers, and from that of the embeddings.
_GATE_STREAM = -3


class TransformerLayer(nn.Module):
    """x + attention(norm x), then x + GELU feed-forward(norm x): ``torch.nn.TransformerEncoderLayer``, norms first."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int, causal: bool) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide hidden_size={hidden_size}; use one that does")
        self.num_heads, self.causal = num_heads, causal
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """``valid_BT``: real tokens, which stand in front; None where all are."""
        qkv = self.qkv_proj(self.attention_norm(hidden_BTD)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        # With a causal mask no real token sees the padding behind it.
        mask = None if valid_BT is None or self.causal else valid_BT[:, None, None]
        mixed_BHTC = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=self.causal)
        hidden_BTD = hidden_BTD + self.o_proj(mixed_BHTC.transpose(1, 2).flatten(2))
        return hidden_BTD + self.down_proj(F.gelu(self.up_proj(self.ffn_norm(hidden_BTD))))


class TransformerExpert(nn.Module):
    """A stack of such layers, (B, T, D) to (B, T, D)."""

    def __init__(self, num_layers: int, *settings: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TransformerLayer(*settings) for _ in range(num_layers)])

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, valid_BT)
        return hidden_BTD


@dataclass
class TransformerExpertsOutput:
    """``hidden_states`` (B, T, D), 0 at padding. ``weights``, ``index`` (B, T, K): the chosen experts and their share,
    equal along T where sequences choose. ``balance_loss``: 0 when all experts are used alike."""

    hidden_states: Tensor
    weights: Tensor
    index: Tensor
    balance_loss: Tensor


class TransformerExperts(nn.Module):
    """E transformers, of which a noisy top-K gate chooses (Shazeer et al. 2017, arXiv:1701.06538).

    ``route_by="sequence"``: one choice for all tokens of a row, from the mean of them; from the first one where
    ``causal``, so that no token's fate depends on later ones. ``"token"``: each token chooses by itself.
    ``cross_expert_heads``: attention among a token's active experts before they are blended; 0 for none.
    The balance loss is CV² of the experts' importance plus, in training, CV² of their smooth load; times 0.1 in the
    paper.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        num_layers: int = 2,
        num_heads: int = 8,
        causal: bool = False,
        route_by: str = "sequence",
        cross_expert_heads: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} is not between 1 and num_experts={num_experts}; use {num_experts} at most")
        if route_by not in ("sequence", "token"):
            raise ValueError(f"route_by={route_by!r} is unknown; use 'sequence' or 'token'")
        self.top_k, self.causal, self.route_by = top_k, causal, route_by
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.noise = nn.Linear(hidden_size, num_experts, bias=False)
        nn.init.zeros_(self.noise.weight)
        self.experts = nn.ModuleList(
            [
                TransformerExpert(num_layers, hidden_size, num_heads, intermediate_size, causal)
                for _ in range(num_experts)
            ]
        )
        self.cross_experts = CrossExpertAttention(hidden_size, cross_expert_heads) if cross_expert_heads else None

    def init_own_weights(self, config: Any) -> None:
        init.zeros_(self.noise.weight)

    def forward(
        self, hidden_BTD: Tensor, lengths_B: Tensor | None = None, noise_keys_T: Tensor | None = None
    ) -> TransformerExpertsOutput:
        """``lengths_B``: real tokens of each row, which stand in front; None where all are.

        ``noise_keys_T`` (B·T,), int64: the gate's noise in training is a function of these; without them it is drawn
        from torch's generator.
        """
        batch, length, width = hidden_BTD.shape
        valid_BT = torch.ones(batch, length, dtype=torch.bool, device=hidden_BTD.device)
        if lengths_B is not None:
            valid_BT = torch.arange(length, device=hidden_BTD.device)[None] < lengths_B[:, None]
        weights_BTK, index_BTK, balance = self._choose(hidden_BTD, valid_BT, noise_keys_T)
        outputs_BTKD = self._run(hidden_BTD, valid_BT, index_BTK)
        if self.cross_experts is not None:
            outputs_BTKD = self.cross_experts(outputs_BTKD)
        blended_BTD = blend(outputs_BTKD, weights_BTK).masked_fill(~valid_BT[..., None], 0)
        return TransformerExpertsOutput(blended_BTD, weights_BTK, index_BTK, balance)

    def _choose(
        self, hidden_BTD: Tensor, valid_BT: Tensor, noise_keys_T: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and indices (B, T, K), and the balance loss over the choices that real tokens made."""
        batch, length, _ = hidden_BTD.shape
        by_sequence = self.route_by == "sequence"
        read, counts = hidden_BTD, valid_BT
        if by_sequence:
            real = hidden_BTD.masked_fill(~valid_BT[..., None], 0)
            mean = real.sum(dim=1, keepdim=True) / valid_BT.sum(dim=1).clamp(min=1)[:, None, None]
            read, counts = (hidden_BTD[:, :1] if self.causal else mean), valid_BT.any(dim=1, keepdim=True)
        wide = torch.promote_types(read.dtype, torch.float32)
        clean = self.gate(read).flatten(0, 1).to(wide)
        logits, spread = clean, F.softplus(self.noise(read).flatten(0, 1).to(wide))
        if self.training:
            logits = clean + spread * self._draw(clean, noise_keys_T, by_sequence)
        weights, index = choose_experts(logits, self.top_k)
        kept = counts.flatten()
        balance = squared_coefficient_of_variation(importance(weights[kept], index[kept], len(self.experts)))
        if self.training:
            load = smooth_load(clean[kept], logits[kept], spread[kept], self.top_k)
            balance = balance + squared_coefficient_of_variation(load)
        weights, index = (each.view(batch, -1, self.top_k).expand(-1, length, -1) for each in (weights, index))
        return weights, index, balance

    def _draw(self, clean_TE: Tensor, noise_keys_T: Tensor | None, by_sequence: bool) -> Tensor:
        if noise_keys_T is None:
            return torch.randn_like(clean_TE)
        if by_sequence:  # the key of each row's first token
            noise_keys_T = noise_keys_T.view(clean_TE.shape[0], -1)[:, 0]
        return counter_normal(noise_keys_T, clean_TE.shape[1], _GATE_STREAM).to(clean_TE)

    def _run(self, hidden_BTD: Tensor, valid_BT: Tensor, index_BTK: Tensor) -> Tensor:
        """Every token's outputs of the experts that it chose, (B, T, K, D), 0 at padding."""
        places, results, unused = [], [], hidden_BTD.new_zeros(())
        for number, expert in enumerate(self.experts):
            chosen_BTK = (index_BTK == number) & valid_BT[..., None]
            chosen_BT = chosen_BTK.any(dim=-1)
            rows_R = chosen_BT.any(dim=1).nonzero().flatten()
            if len(rows_R) == 0:
                if self.training:  # on one token, for nothing: workers that share parameters call all modules alike
                    unused = unused + 0 * expert(hidden_BTD[:1, :1]).sum()
                continue
            chosen_RT = chosen_BT[rows_R]
            lengths_R = chosen_RT.sum(dim=1)
            tokens_RTD, order_RT = hidden_BTD[rows_R], front_order(chosen_RT)
            if order_RT is not None:
                tokens_RTD = take_columns(tokens_RTD, order_RT)
            tokens_RTD = tokens_RTD[:, : int(lengths_R.max())]
            real_RT = torch.arange(tokens_RTD.shape[1], device=rows_R.device)[None] < lengths_R[:, None]
            output_RTD = expert(tokens_RTD, None if bool(real_RT.all()) else real_RT)
            # Row by row and in order on both sides.
            results.append(output_RTD[real_RT])
            places.append(chosen_BTK.flatten().nonzero().flatten())
        outputs_ND = hidden_BTD.new_zeros(index_BTK.numel(), hidden_BTD.shape[-1])
        if places:
            outputs_ND = outputs_ND.index_copy(0, torch.cat(places), torch.cat(results).to(outputs_ND.dtype))
        return (outputs_ND + unused).view(*index_BTK.shape, -1)
