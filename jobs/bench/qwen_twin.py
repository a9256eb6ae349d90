"""A Qwen3 of transformers and the same model as ours: equal weights, equal logits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM
from mmada.tokenizer import PAD_ID, ByteTokenizer

HEAD_DIM = 32


def twins(
    width: int, layers: int, max_position_embeddings: int, eos_token_id: int | list[int] | None
) -> tuple[MMaDAForCausalLM, Qwen3ForCausalLM]:
    """Two models over bytes with the same random weights, in evaluation mode."""
    sizes: dict[str, Any] = {
        "vocab_size": ByteTokenizer().vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_DIM,
        "num_key_value_heads": max(1, width // HEAD_DIM // 2),
        "head_dim": HEAD_DIM,
        "intermediate_size": 3 * width,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "pad_token_id": PAD_ID,
        "eos_token_id": eos_token_id,
    }
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    ours = MMaDAForCausalLM(MMaDAConfig(**sizes, qk_norm=True, num_experts=0)).eval()
    weights = {name.replace(".self_attn.", ".mixer."): each for name, each in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    return ours, theirs
