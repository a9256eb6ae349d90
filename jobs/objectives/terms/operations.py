"""What a token costs on the two ways through each gated layer: operations counted, or time measured.

Both are taken on a layer built anew: an engine may have the model's own weights split over the workers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmada.model import MMaDAForCausalLM
from mmada.nn.context import Context
from mmada.nn.mixers.hybrid import RoutedHybrid
from mmada.nn.positions import rotary_cos_sin
from mmada.training.objectives.compute import GateCost

_TOKENS = 64  # of the row that operations are counted on
_WARM_UPS, _ROUNDS = 2, 9


def counted_costs(model: MMaDAForCausalLM) -> dict[str, GateCost]:
    """Floating-point operations, by the name of every layer whose gate decides what is computed; none without such."""

    def operations(run: Callable[[], None]) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / _TOKENS

    return {
        name: GateCost(*(operations(_pass_over(side, model, _TOKENS)) for side in sides))
        for name, sides in _layers_like(model).items()
    }


def measured_costs(model: MMaDAForCausalLM, num_tokens: int) -> dict[str, GateCost]:
    """Seconds in a forward pass over a row of so many tokens, in the same form; medians over turns of both ways."""
    return {
        name: GateCost(
            *(
                each / num_tokens
                for each in _median_seconds([_pass_over(side, model, num_tokens) for side in sides], model.device)
            )
        )
        for name, sides in _layers_like(model).items()
    }


def _layers_like(model: MMaDAForCausalLM) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Of every gated layer the two sides, where the gate is 1 and where it is 0, with weights of their own."""
    found: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedHybrid):
            with torch.random.fork_rng(devices=[]):  # what training draws must not depend on this
                layer = RoutedHybrid(model.config, module.layer_idx)
                for parameter in layer.parameters():
                    nn.init.normal_(parameter, std=0.02)
            layer = layer.to(device=model.device, dtype=model.dtype).eval()
            found[name] = layer.recurrent, layer.attention
    return found


def _pass_over(side: nn.Module, model: MMaDAForCausalLM, num_tokens: int) -> Callable[[], None]:
    """A forward pass of one side over a row of tokens of its own."""
    config, device = model.config, model.device
    hidden_BTD = torch.ones(1, num_tokens, config.hidden_size, dtype=model.dtype, device=device)
    positions_BT = torch.arange(num_tokens, device=device)[None]
    context = Context(shape=(1, num_tokens), device=device, position_ids_BT=positions_BT)
    if config.position_embedding_type == "rope":
        context.rotary = rotary_cos_sin(config, positions_BT, hidden_BTD.dtype)

    @torch.no_grad()
    def run() -> None:
        side(hidden_BTD, context)

    return run


def _median_seconds(runs: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
    """Of each, all of them in turns, so that what slows the machine for a while slows all."""
    times: list[list[float]] = [[] for _ in runs]
    for index in range(_WARM_UPS + _ROUNDS):
        for run, own in zip(runs, times, strict=True):
            started = now(device)
            run()
            if index >= _WARM_UPS:
                own.append(now(device) - started)
    return [statistics.median(own) for own in times]


def now(device: torch.device) -> float:
    """Seconds on a clock, after what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
