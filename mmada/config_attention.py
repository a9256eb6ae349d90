"""What attention asks of a config, said before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmada.nn.attention.choice import ABILITIES, choose_kernel

if TYPE_CHECKING:
    from mmada.config import MMaDAConfig

# The types of rotary positions, transformers' and a static NTK, with the keys that each needs.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "ntk": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def attention_kinds(config: MMaDAConfig) -> set[str]:
    """The kinds of attention that a model of this config builds, those inside other layers with them."""
    kinds = set(config.mixer_types)
    if "hybrid" in kinds:
        kinds.add(config.hybrid.attention)
    if kinds & {"memory_gate", "memory_layer"}:
        kinds.add(config.memory.attention)
    return kinds


def check_attention(config: MMaDAConfig) -> None:
    """Refuse what cannot be built or computed; raises ValueError naming field, value and remedy."""
    for name, smallest in (
        ("sliding_window", 1),
        ("sparse_block_size", 1),
        ("sparse_window_blocks", 1),
        ("sparse_global_blocks", 0),
        ("sparse_random_blocks", 0),
        ("relative_attention_num_buckets", 2),
    ):
        if getattr(config, name) < smallest:
            raise ValueError(f"{name}={getattr(config, name)} is too small; use {smallest} or more")
    for name, example in (("attn_logit_softcapping", 50), ("final_logit_softcapping", 30)):
        cap = getattr(config, name)
        if cap is not None and cap <= 0:
            raise ValueError(f"{name}={cap} is not positive; use {example}, say, or null for no cap")
    exact = config.relative_attention_num_buckets // 2
    if config.relative_attention_max_distance <= exact:
        raise ValueError(
            f"relative_attention_max_distance={config.relative_attention_max_distance} is not above half of "
            f"relative_attention_num_buckets={config.relative_attention_num_buckets}; use {exact + 1} or more"
        )
    _check_rotary(config)
    if "multiscale" in attention_kinds(config):
        _check_window_sizes(config)
    if config._attn_implementation in ABILITIES:
        choose_kernel(config, training=True)


def _check_window_sizes(config: MMaDAConfig) -> None:
    sizes, kv_heads = config.window_sizes, config.num_key_value_heads
    for size in sizes:
        if size != -1 and size < 1:
            raise ValueError(f"window_sizes holds {size}; use 1 or more, or -1 for a head that sees everything")
    if not sizes or kv_heads % len(sizes):
        divisors = [count for count in range(1, kv_heads + 1) if kv_heads % count == 0]
        raise ValueError(
            f"window_sizes={sizes} does not divide num_key_value_heads={kv_heads} into whole groups; "
            f"give one of {divisors} windows"
        )


def _check_rotary(config: MMaDAConfig) -> None:
    parameters = config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        raise ValueError(f"rope_parameters.rope_type={kind} is unknown; use one of {', '.join(ROPE_KEYS)}")
    for name in ROPE_KEYS[kind]:
        if name not in parameters:
            raise ValueError(f"rope_parameters.rope_type={kind} needs rope_parameters.{name}; add it")
    for name in ("rope_theta", "factor"):
        value = parameters.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            example = {"rope_theta": 10000.0, "factor": 4.0}[name]
            raise ValueError(f"rope_parameters.{name}={value} is not a positive number; use {example}, say")
    if (factor := parameters.get("factor", 1.0)) < 1:
        raise ValueError(f"rope_parameters.factor={factor} would shorten the context; use 1 or more")
    if kind == "ntk" and config.head_dim <= 2:
        raise ValueError(f"head_dim={config.head_dim} leaves rope_type=ntk a single pair to turn; use 4 or more")
