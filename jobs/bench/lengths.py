"""Layers side by side at several lengths: tokens per second, how time grows, and ratios to a peer.

# B batch, T tokens, D width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from jobs.bench.measuring import in_turns, log_slope, quartiles, step_of, with_share
from jobs.plan_report import table_of
from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM
from mmada.nn.context import Context
from mmada.nn.positions import rotary_cos_sin

Times = dict[int, dict[str, list[float]]]  # milliseconds of each round, by length and runner


@dataclass(frozen=True)
class Runner:
    """A layer on (B, T, D). ``longest``: length up to which it is run. ``peers``: whom it is compared with."""

    name: str
    layer: nn.Module
    longest: int | None = None
    peers: tuple[str, ...] = ()

    def runs_at(self, length: int) -> bool:
        return self.longest is None or length <= self.longest


class Alone(nn.Module):
    """A mixer without the rest of its block, called as the model does."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer: Any = mixer

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        config, (batch, length), device = self.mixer.config, hidden_BTD.shape[:2], hidden_BTD.device
        position_ids = torch.arange(length, device=device).expand(batch, length)
        rotary = None
        if config.position_embedding_type == "rope":
            rotary = rotary_cos_sin(config, position_ids, hidden_BTD.dtype)
        context = Context(shape=(batch, length), device=device, position_ids_BT=position_ids, rotary=rotary)
        return self.mixer(hidden_BTD, context, None)[0]


def mixer_alone(kind: str, attn_implementation: str = "sdpa", **settings: Any) -> Alone:
    """The mixer of a model of one layer, with the model's starting values."""
    torch.manual_seed(0)
    config = MMaDAConfig(num_hidden_layers=1, mixer_types=kind, **settings)
    model = MMaDAForCausalLM._from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
    return Alone(model.model.layers[0].mixer)


def race(runners: Sequence[Runner], lengths: Sequence[int], batch: int, width: int, rounds: int) -> Times:
    """Forward and backward of every runner at every length; at one length they take turns."""
    times: Times = {}
    for length in lengths:
        torch.manual_seed(length)
        hidden_BTD = torch.randn(batch, length, width, requires_grad=True)
        steps = {each.name: step_of(each.layer, hidden_BTD) for each in runners if each.runs_at(length)}
        times[length] = in_turns(steps, rounds, warm_ups=1)
    return times


def race_table(title: str, runners: Sequence[Runner], times: Times, batch: int) -> Table:
    """Tokens per second, the power with which time grows with length, and below it the ratios to the peer."""
    table = table_of(f"{title}; tokens/s at", *(f"{length:,}" for length in times), "time grows as")
    for runner in runners:
        taken = {length: each[runner.name] for length, each in times.items() if runner.name in each}
        speeds = {length: 1e3 * batch * length / quartiles(ms)[1] for length, ms in taken.items()}
        cells = [f"{speeds[length]:,.0f}" if length in speeds else "–" for length in times]
        table.add_row(runner.name, *cells, f"T^{slope(taken):.2f}" if len(taken) > 1 else "")
        for peer in runner.peers:
            ratios = [speed_ratios(each, runner.name, peer) for each in times.values()]
            table.add_row(f"  times {peer}", *(with_share(each) if each else "" for each in ratios), style="bold")
    return table


def slope(taken: dict[int, list[float]]) -> float:
    """Of the medians over the lengths."""
    return log_slope(list(taken), [quartiles(milliseconds)[1] for milliseconds in taken.values()])


def speed_ratios(taken: dict[str, list[float]], name: str, peer: str) -> list[float]:
    """How many times as fast as the peer, round by round; empty where one of them was not run."""
    if name not in taken or peer not in taken:
        return []
    return [theirs / ours for ours, theirs in zip(taken[name], taken[peer], strict=True)]


def race_record(runners: Sequence[Runner], times: Times, batch: int) -> dict[str, Any]:
    """The same for a program, with every single time."""
    return {
        "batch": batch,
        "runners": {each.name: {"peers": each.peers, "parameters": num_parameters(each.layer)} for each in runners},
        "milliseconds": {str(length): each for length, each in times.items()},
    }


def num_parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def caption(threads: int, rounds: int) -> str:
    """How all of these are measured."""
    return (
        f"forward and backward, float32, {threads} threads, {rounds} rounds in turns; medians, and medians of the "
        "ratios within a round ± half the distance between their quartiles"
    )
