"""What ``mmada profile`` switches off, one part at a time: a new part of the model gets a row in ``SWITCHES``.

In brackets stands what takes the part's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmada.config import MMaDAConfig
from mmada.config_parts import SECTIONS


@dataclass(frozen=True)
class Switch:
    """One part of a model that can be left out.

    ``off``: the config's fields without it, by name; ``section.name`` for one of a section.
    ``needs``: whether a config builds what the part belongs to; a section's fields need their section anyway.
    """

    name: str
    off: Mapping[str, Any]
    needs: Callable[[MMaDAConfig], object] = field(default=lambda config: True)

    def is_on(self, config: MMaDAConfig) -> bool:
        """Whether a model of this config has the part."""
        sections = {name.partition(".")[0] for name in self.off if "." in name}
        return (
            sections <= {*config.sections_in_use}
            and bool(self.needs(config))
            and any(setting(config, name) != value for name, value in self.off.items())
        )


def _has_experts(config: MMaDAConfig) -> object:
    return config.moe_layers


def _has_biased_positions(config: MMaDAConfig) -> object:
    return config.position_embedding_type in ("alibi", "relative")


SWITCHES = (
    Switch("experts (dense)", {"num_experts": 0, "mlp_layer_types": None}, needs=_has_experts),
    Switch("shared experts", {"num_shared_experts": 0}, needs=_has_experts),
    Switch("cross-expert attention", {"cross_expert_attention": False}, needs=_has_experts),
    Switch("router noise", {"router_noise": False}, needs=_has_experts),
    Switch("router bias", {"router_bias_update_rate": 0.0}, needs=_has_experts),
    Switch("sparsemax router", {"router_normalizer": "softmax"}, needs=_has_experts),
    Switch("biased positions (rotary)", {"position_embedding_type": "rope"}, needs=_has_biased_positions),
    Switch("query and key norms", {"qk_norm": False}),
    Switch("attention soft cap", {"attn_logit_softcapping": None}),
    Switch("final soft cap", {"final_logit_softcapping": None}),
    Switch("sparsemax attention", {"attention_normalizer": "softmax"}),
    Switch("attention dropout", {"attention_dropout": 0.0}),
    Switch("noise on embeddings", {"embedding_dropout": 0.0, "token_mask_probability": 0.0}),
    Switch("hybrid's memory slots", {"hybrid.memory_slots": 0}),
    Switch("memory's momentum", {"memory.momentum": False}),
    Switch("memory's forgetting", {"memory.forgetting": False}),
    Switch("memory's convolution", {"memory.convolution": False}),
    Switch("memory's persistent tokens", {"memory.num_persistent_tokens": 0}),
    Switch("memory's gate by surprise", {"memory.gate": "continuous"}),
    Switch("memory's limit on gradients", {"memory.max_gradient_norm": None}),
    Switch("hashed byte n-grams", {"patches.hash_sizes": []}),
    Switch("byte patches", {"patches.mode": "none"}),
)


def switches_in_use(config: MMaDAConfig) -> list[Switch]:
    """What can be switched off in a model: each kind of mixer (for plain attention), and the rows of ``SWITCHES``."""
    assert config.mixer_types is not None, "filled in by the config itself"
    kinds = [kind for kind in dict.fromkeys(config.mixer_types) if kind != "attention"]
    mixers = [
        Switch(
            f"{kind} layers (attention)",
            {"mixer_types": ["attention" if each == kind else each for each in config.mixer_types]},
        )
        for kind in kinds
    ]
    return mixers + [switch for switch in SWITCHES if switch.is_on(config)]


def all_off(config: MMaDAConfig) -> Switch:
    """All of them at once: a plain transformer."""
    off = {name: value for switch in switches_in_use(config) for name, value in switch.off.items()}
    return Switch("all of these", {**off, "mixer_types": "attention"})


def config_without(config: MMaDAConfig, switch: Switch) -> MMaDAConfig:
    """The config with one part switched off. Raises ValueError, naming field and value, where that cannot be built."""
    values = config.to_dict()
    for name, value in switch.off.items():
        *section, last = name.split(".")
        (values[section[0]] if section else values)[last] = value
    return MMaDAConfig.from_dict(values)


def setting(config: MMaDAConfig, name: str) -> Any:
    """A field's value, or that of a ``section.field``."""
    section, dot, inner = name.partition(".")
    return getattr(getattr(config, section), inner) if dot and section in SECTIONS else getattr(config, name)
