"""One block: x + mixer(norm x), then x + feed-forward(norm x).

An expert-parallel engine may put its own layer in the place of the expert block ``mlp``; what it does not know of
(noise, shared experts, cross-expert attention, other weights of the experts) therefore stands beside ``mlp``.

# B batch, T tokens, D model, E experts, K chosen experts, N = T·K pairs of a token and one of its experts
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from mmada.config import MMaDAConfig
from mmada.nn.context import Context
from mmada.nn.cross_expert import CrossExpertAttention, blend
from mmada.nn.ffn import FeedForward
from mmada.nn.mixers.registry import build_mixer
from mmada.nn.moe import MoE, run_experts
from mmada.nn.router import RouterTap, choose_experts, selection_bias_of


class Block(GradientCheckpointingLayer):
    """Pre-norm block; ``mixer_types`` and ``mlp_layer_types`` say which mixer and which feed-forward it has."""

    def __init__(self, config: MMaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = build_mixer(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        is_moe = config.mlp_layer_types[layer_idx] == "moe"
        self.mlp: nn.Module = MoE(config) if is_moe else FeedForward(config)
        self.router_tap = RouterTap(config, layer_idx) if is_moe else None
        self.shared_experts: FeedForward | None = None
        self.cross_experts: CrossExpertAttention | None = None
        if is_moe and config.num_shared_experts:
            self.shared_experts = FeedForward(config, config.num_shared_experts * config.moe_intermediate_size)
        if is_moe and config.cross_expert_attention:
            self.cross_experts = CrossExpertAttention(config.hidden_size, config.cross_expert_heads)
        self.config = config

    def forward(
        self,
        hidden_states: Tensor,
        context: Context,
        noise_keys_T: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) to (B, T, D), and the router's logits (B·T, E) of an expert block, else None."""
        mixed, _ = self.mixer(self.input_layernorm(hidden_states), context, past_key_values)
        hidden_states = hidden_states + mixed
        normed = self.post_attention_layernorm(hidden_states)
        if self.router_tap is None:
            return hidden_states + self.mlp(normed), None
        if self.cross_experts is None and self.config.router_normalizer == "softmax":
            output, router_logits_TE = self.router_tap.run(self.mlp, normed, noise_keys_T)
        else:
            output, router_logits_TE = self._mix_experts(normed, noise_keys_T)
        if self.shared_experts is not None:
            output = output + self.shared_experts(normed)
        return hidden_states + output, router_logits_TE

    def _mix_experts(self, normed_BTD: Tensor, noise_keys_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """The expert block in steps (gate, choice, experts, blend), for what its own forward does not offer."""
        config, flat_TD = self.config, normed_BTD.flatten(0, 1)
        logits_TE = self.router_tap.run_gate(self.mlp, flat_TD, noise_keys_T)
        weights_TK, index_TK = choose_experts(
            logits_TE,
            config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
            selection_bias=selection_bias_of(self.mlp),
            normalizer=config.router_normalizer,
        )
        if self.cross_experts is None:
            return run_experts(self.mlp, flat_TD, index_TK, weights_TK).view_as(normed_BTD), logits_TE
        # Every pair goes as a token of its own with one expert, so that each expert's output comes back by itself.
        index_N1 = index_TK.reshape(-1, 1)
        pairs_ND = flat_TD.repeat_interleave(config.num_experts_per_tok, dim=0)
        outputs_ND = run_experts(self.mlp, pairs_ND, index_N1, torch.ones_like(index_N1, dtype=weights_TK.dtype))
        outputs_TKD = self.cross_experts(outputs_ND.unflatten(0, index_TK.shape))
        return blend(outputs_TKD, weights_TK).view_as(normed_BTD), logits_TE
