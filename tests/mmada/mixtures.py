"""The small models that whole-model tests go over: each kind of layer alone, and a few mixes.

A kind joins as soon as ``mmada.nn.mixers.registry`` has it, so a new mixer is held to what transformers' users expect
without another line here.
"""

from typing import Any

import pytest
import torch

from mmada.config import MIXER_TYPES
from mmada.model import MMaDAForCausalLM
from mmada.nn.mixers.registry import MIXERS
from mmada.presets import PRESETS, build_config

# Small enough that a test's dozen tokens cross every window, block, chunk and segment.
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_experts": 0,
    "sliding_window": 5,
    "window_sizes": [3, -1],
    "sparse_block_size": 3,
    "sparse_window_blocks": 1,
    "ssm": {"state_size": 4, "head_dim": 16, "chunk_size": 4},
    "hybrid": {"memory_slots": 3, "memory_chunk_size": 3},
    "memory": {"num_heads": 2, "head_dim": 8, "chunk_size": 3, "segment_size": 4, "num_persistent_tokens": 2},
    "initializer_range": 0.2,
}

PATCHES = {"mode": "space", "local_size": 16, "local_window": 3, "hash_sizes": [2, 3], "hash_vocab": 31}
ENTROPY_MODEL = {
    **PRESETS["debug"],
    **{key: SIZES[key] for key in ("hidden_size", "head_dim", "intermediate_size", "num_experts", "sliding_window")},
    "num_hidden_layers": 1,
    "mixer_types": "window",
    "mlp_layer_types": None,
    "initializer_range": 0.2,
}

# name: what differs from one layer of attention followed by one of each kind
CANDIDATES: dict[str, dict[str, Any]] = {
    **{kind: {"mixer_types": f"{kind}*2"} for kind in MIXER_TYPES},
    "ssm-selective": {"mixer_types": "ssm*2", "ssm": {**SIZES["ssm"], "form": "selective_scan"}},
    "hybrid-routed": {"mixer_types": "hybrid*2", "hybrid": {**SIZES["hybrid"], "fusion": "routed"}},
    "hybrid-source-window": {
        "mixer_types": "hybrid*2",
        "hybrid": {**SIZES["hybrid"], "fusion": "source", "attention": "window", "slot_allocation": True},
    },
    "experts": {
        "mlp_layer_types": "dense,moe",
        "num_experts": 4,
        "moe_intermediate_size": 24,
    },
    "experts-together": {
        "mlp_layer_types": "dense,moe",
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "num_shared_experts": 1,
        "cross_expert_attention": True,
        "cross_expert_heads": 4,
        "router_normalizer": "sparsemax",
    },
    "alibi-capped": {
        "mixer_types": "attention,window",
        "position_embedding_type": "alibi",
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 9.0,
        "qk_norm": True,
    },
    "relative": {"mixer_types": "window,attention", "position_embedding_type": "relative"},
    "no-positions-sparsemax": {
        "mixer_types": "ssm,attention",
        "position_embedding_type": "none",
        "attention_normalizer": "sparsemax",
    },
    "patches-space": {"mixer_types": "attention,ssm", "patches": PATCHES},
    "patches-static-experts": {
        "mixer_types": "memory_layer,window",
        "mlp_layer_types": "dense,moe",
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "patches": {**PATCHES, "mode": "static", "size": 2},
    },
    "patches-entropy": {
        "mixer_types": "window,hybrid",
        "patches": {**PATCHES, "mode": "entropy", "threshold": 4.9, "entropy_model": ENTROPY_MODEL},
    },
    "sparse-ssm-window": {"mixer_types": "sparse,ssm,window", "num_hidden_layers": 3},
    "all-kinds": {"mixer_types": list(MIXER_TYPES), "num_hidden_layers": len(MIXER_TYPES)},
}
VARIANTS = (
    "ssm-selective",
    "hybrid-source-window",
    "experts-together",
    "alibi-capped",
    "relative",
    "no-positions-sparsemax",
    "patches-static-experts",
    "sparse-ssm-window",
)


def config_of(name: str, **overrides: Any):
    """The config of a mixture, with some fields replaced."""
    return build_config("debug", **{**SIZES, **CANDIDATES[name], **overrides})


def is_patched(name: str) -> bool:
    """Whether the layers go over patches, so that their states and weights are not by the caller's columns."""
    return config_of(name).patches.mode != "none"


def is_registered(name: str) -> bool:
    return set(config_of(name).mixer_types) <= set(MIXERS)


MIXTURES = [name for name in CANDIDATES if is_registered(name)]


def make_mixture(name: str, dtype=torch.float64, attention: str = "sdpa", **overrides: Any) -> MMaDAForCausalLM:
    """A model in evaluation mode, whose parts are stirred so that gates that start closed do not hide anything."""
    torch.manual_seed(0)
    config = config_of(name, **overrides)
    model = MMaDAForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def random_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(8, 264, (batch, length), generator=torch.Generator().manual_seed(seed))


every_mixture = pytest.mark.parametrize("name", MIXTURES)
# For what does not depend on how a kind of layer is set: files, adapters, hooks.
every_kind = pytest.mark.parametrize("name", [name for name in MIXTURES if name not in VARIANTS])
