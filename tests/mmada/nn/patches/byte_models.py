"""Small models with byte patches, and texts for them."""

import torch

from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM

ENTROPY_MODEL = {
    "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24,
    "mixer_types": "window", "sliding_window": 7, "initializer_range": 0.5,
}  # fmt: skip
RULES = {
    "static": {"mode": "static", "size": 3},
    "space": {"mode": "space"},
    "entropy": {"mode": "entropy", "threshold": 4.2},
    "monotonic": {"mode": "monotonic", "threshold": 0.1},
    "combined": {"mode": "combined", "threshold": 4.2, "threshold_add": 0.05},
    "cut": {"mode": "entropy", "threshold": 4.6, "max_size": 3},
}


def make_model(rule="space", dtype=torch.float64, patches=None, **overrides):
    """A model in evaluation mode; ``rule`` names one of ``RULES``."""
    torch.manual_seed(0)
    settings = {
        **RULES[rule], "local_size": 16, "local_window": 6, "hash_sizes": [2, 5], "hash_vocab": 53,
        "entropy_model": ENTROPY_MODEL, **(patches or {}),
    }  # fmt: skip
    values = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40}
    config = MMaDAConfig(**{**values, "initializer_range": 0.2, "patches": settings, **overrides})
    return MMaDAForCausalLM._from_config(config, dtype=dtype).eval()


def text_ids(batch, length, seed=1):
    """Bytes of made-up words, so that patches by words have different lengths."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(0x61, 0x7B, (batch, length), generator=generator)
    is_space = torch.rand(batch, length, generator=generator) < 0.25
    return 8 + torch.where(is_space, 0x20, letters)
