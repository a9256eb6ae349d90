"""Operations per token of the two ways through each gated layer, counted on the layers themselves."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmada.model import MMaDAForCausalLM
from mmada.nn.context import Context
from mmada.nn.mixers.hybrid import RoutedHybrid
from mmada.training.objectives.compute import GateCost

_TOKENS = 64


def gate_costs(model: MMaDAForCausalLM) -> dict[str, GateCost]:
    """By the name of every layer whose gate decides what is computed; none where no layer has such a gate."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedHybrid):
            found[name] = GateCost(open=operations(module.recurrent, model), shut=operations(module.attention, model))
    return found


@torch.no_grad()
def operations(side: nn.Module, model: MMaDAForCausalLM) -> float:
    """Floating-point operations per token of one side, over a row of tokens of its own."""
    side, config = copy.deepcopy(side).eval(), model.config
    parameter = next(side.parameters())
    hidden_BTD = torch.zeros(1, _TOKENS, config.hidden_size, dtype=parameter.dtype, device=parameter.device)
    positions_BT = torch.arange(_TOKENS, device=parameter.device)[None]
    context = Context(shape=(1, _TOKENS), device=parameter.device, position_ids_BT=positions_BT)
    if config.position_embedding_type == "rope":
        from mmada.nn.positions import rotary_cos_sin

        context.rotary = rotary_cos_sin(config, positions_BT, hidden_BTD.dtype)
    with FlopCounterMode(display=False) as counter:
        side(hidden_BTD, context)
    return counter.get_total_flops() / _TOKENS
