"""One block: x + mixer(norm x), then x + feed-forward(norm x).

# B batch, T tokens, D model, E experts
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from mmada.config import MMaDAConfig
from mmada.nn.context import Context
from mmada.nn.ffn import FeedForward
from mmada.nn.mixers.registry import build_mixer
from mmada.nn.moe import MoE
from mmada.nn.router import RouterTap


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
        output, router_logits_TE = self.router_tap.run(self.mlp, normed, noise_keys_T)
        return hidden_states + output, router_logits_TE
