"""Every kind of sequence mixer by its name in ``MMaDAConfig.mixer_types``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from mmada.config import MMaDAConfig
from mmada.config_parts import ATTENTION_KINDS
from mmada.nn.mixers.attention import Attention
from mmada.nn.mixers.hybrid import build_hybrid
from mmada.nn.mixers.memory import Memory, MemoryGate, MemoryLayer
from mmada.nn.mixers.memory_context import MemoryContext
from mmada.nn.mixers.ssm import SSM

MIXERS: dict[str, Callable[[MMaDAConfig, int], nn.Module]] = {
    **{kind: partial(Attention, kind=kind) for kind in ATTENTION_KINDS},
    "ssm": SSM,
    "hybrid": build_hybrid,
    "memory": Memory,
    "memory_context": MemoryContext,
    "memory_gate": MemoryGate,
    "memory_layer": MemoryLayer,
}


def build_mixer(config: MMaDAConfig, layer_idx: int) -> nn.Module:
    """The mixer of one layer.

    Every mixer is called ``mixer(hidden_states, context, past_key_values) -> (mixed, weights)``: (B, T, D) to
    (B, T, D), and attention weights (B, H, T, S) where the kernel knows them, else None. ``context`` is a
    ``mmada.nn.context.Context``; ``past_key_values`` an ``MMaDACache``, or None.
    """
    return MIXERS[config.mixer_types[layer_idx]](config, layer_idx)
