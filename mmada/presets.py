"""Named model sizes. Plain dictionaries, so that reading them costs no import of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmada.config import MMaDAConfig

# The three large sizes have the widths of Gemma 3's language models and its vocabulary size; the two
# small ones speak bytes (264 ids) and have experts in every block but the first.
PRESETS: dict[str, dict[str, Any]] = {
    "debug": {
        "vocab_size": 264,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "moe"],
        "max_position_embeddings": 1024,
    },
    "tiny": {
        "vocab_size": 264,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "moe", "moe", "moe"],
        "max_position_embeddings": 2048,
    },
    "1b": {
        "vocab_size": 262144,
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "4b": {
        "vocab_size": 262144,
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 10240,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "12b": {
        "vocab_size": 262144,
        "hidden_size": 3840,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "intermediate_size": 15360,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
}


def build_config(preset: str, **overrides: Any) -> MMaDAConfig:
    """The config of a named size with some fields replaced.

    Raises ValueError, in one line naming field, value and remedy, for an unknown preset, an unknown
    field or an architecture that cannot be built.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset} is not a known size; use one of {', '.join(PRESETS)}")
    from huggingface_hub.errors import StrictDataclassError

    from mmada.config import MMaDAConfig

    known = MMaDAConfig.architecture_fields()
    for name in overrides:
        if name not in known:
            raise ValueError(f"{name} is not a field of the model; the fields are {', '.join(sorted(known))}")
    values = {**PRESETS[preset], **overrides}
    if "num_hidden_layers" in overrides and "mlp_layer_types" not in overrides:
        values.pop("mlp_layer_types", None)  # the preset's pattern was for its own depth
    if values.get("num_experts") == 0 and "mlp_layer_types" not in overrides:
        values.pop("mlp_layer_types", None)
    try:
        return MMaDAConfig(**values)
    except (StrictDataclassError, TypeError) as error:
        reason = str(error.__cause__ or error).splitlines()[-1].strip()
        raise ValueError(reason.removeprefix("ValueError: ").removeprefix("TypeError: ")) from error
