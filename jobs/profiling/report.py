"""A profile on the terminal, as numbers for programs, and in MLflow."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from cluster.tracking import Tracker
from jobs.bench.measuring import in_units, quartiles, short, with_share, with_spread
from jobs.plan import gib
from jobs.plan_report import table_of
from jobs.profiling.run import Cost, Profile
from mmada.plots.cost import cost_figure

WIDTH = 120


def publish(profile: Profile, tracker: Tracker, terminal: TextIO, scratch: Path, json_file: Path | None) -> None:
    """Print the tables, write the JSON file if one is wanted, and record all of it in MLflow.

    ``scratch``: a folder for what MLflow is given. Raises ClusterError where MLflow refuses the run.
    """
    with (scratch / "profile.txt").open("w", encoding="utf-8") as text:
        for file in (terminal, text):
            show(profile, Console(file=file, width=WIDTH, highlight=False))
    written = json.dumps(record(profile), indent=1) + "\n"
    for path in (scratch / "profile.json", json_file):
        if path:
            path.write_text(written, encoding="utf-8")
    tracker.start(profile.recipe.model_dump())  # only now, as its threads sample the machine
    tracker.log(0, metrics(profile))
    tracker.figure("profile", figure(profile))
    for name in ("profile.txt", "profile.json"):
        tracker.artifact(scratch / name)
    problems = tracker.finish("done")
    for problem in problems:
        print(problem, file=terminal)
    if not problems:
        tracker.forget()
    print(f"recorded as {tracker.run_name} in {tracker.uri}", file=terminal)


def show(profile: Profile, console: Console) -> None:
    """Print both tables and how they were measured."""
    console.print(parts_table(profile))
    console.print(models_table(profile))
    for line in notes(profile):
        console.print(f"- {line}", soft_wrap=False)


def parts_table(profile: Profile) -> Table:
    """A row for each part, alone; then all of them together, and the whole model."""
    table = table_of(
        "parts, each alone", "layers", "forward ms", "backward ms", "time", "memory", "FLOP", "", "parameters"
    )
    whole = profile.whole
    step, flops = quartiles(whole.step_ms)[1], sum(whole.flops)
    for cost in profile.parts:
        table.add_row(
            cost.name,
            str(cost.num_layers),
            with_share(cost.forward_ms),
            with_share(cost.backward_ms),
            f"{quartiles(cost.step_ms)[1] / step:.0%}",
            gib(cost.memory),
            in_units(sum(cost.flops)),
            f"{sum(cost.flops) / flops:.0%}",
            in_units(cost.parameters),
        )
    together = [quartiles(cost.step_ms)[1] for cost in profile.parts]
    counted = sum(sum(cost.flops) for cost in profile.parts)
    table.add_section()
    table.add_row(
        "sum of the parts",
        "",
        short(sum(quartiles(cost.forward_ms)[1] for cost in profile.parts)),
        short(sum(quartiles(cost.backward_ms)[1] for cost in profile.parts)),
        f"{sum(together) / step:.0%}",
        "",  # what one part returns the next one keeps
        in_units(counted),
        f"{counted / flops:.0%}",
        in_units(sum(cost.parameters for cost in profile.parts)),
    )
    table.add_row(
        "the whole model",
        str(whole.num_layers),
        with_share(whole.forward_ms),
        with_share(whole.backward_ms),
        "100%",
        gib(whole.memory),
        in_units(flops),
        "100%",
        in_units(whole.parameters),
    )
    return table


def models_table(profile: Profile) -> Table:
    """A row for the full model and each one without a part, with ratios to the full model."""
    table = table_of("the model without", "step ms", "times full", "memory", "times", "FLOP", "times", "parameters")
    full = profile.models[0]
    for cost in profile.models:
        table.add_row(
            cost.name,
            short(quartiles(cost.step_ms)[1]),
            with_spread(quartiles(time_ratios(cost))) if cost.beside else "",
            gib(cost.memory),
            short(cost.memory / full.memory),
            in_units(sum(cost.flops)),
            short(sum(cost.flops) / sum(full.flops)),
            in_units(cost.parameters),
        )
    return table


def time_ratios(cost: Cost) -> list[float]:
    """A model's step over the full model's right beside it, in every round."""
    return [sum(own) / sum(full) for own, full in zip(cost.passes, cost.beside, strict=True)]


def notes(profile: Profile) -> list[str]:
    """How it was measured, and what the numbers do not say."""
    train = profile.recipe.train
    memory = (
        "memory: bytes that autograd keeps for the backward pass, and results; parameters, gradients and what lives "
        "only within a pass are not in it"
        if profile.whole.peak_bytes is None
        else "memory: the CUDA allocator's peak over what was there before (weights), gradients included"
    )
    threads = "thread" if profile.num_threads == 1 else "threads"
    lines = [
        f"{profile.device}, {profile.num_threads} {threads}, {train.precision}; {profile.recipe.micro_batch} rows of "
        f"{train.sequence_length} {profile.tokens}, one document each; {profile.rounds} rounds in turns after "
        "warm-ups; times are medians ± half the distance between the quartiles",
        "a model without a part is timed right before or after the full one; ratios are of such pairs: median "
        "(quartiles)",
        "a part runs all its layers forward and backward on the inputs that it has in the model, without the rest; "
        "sums, rotary angles, soft caps of the logits and the routers' losses are in the whole model only",
        memory,
        "FLOP: matrix products, convolutions and attention, forward and backward, a fused attention's masked half "
        "included; element-wise work, of which scans and norms consist, is not counted",
        "no optimizer, no communication between workers, all experts in one process",
    ]
    if train.gradient_checkpointing:
        lines.append("gradient checkpointing: whole models compute their blocks twice, parts do not")
    return [*lines, *profile.refused]


def record(profile: Profile) -> dict[str, Any]:
    """Everything, with every single time."""

    def rows(costs: list[Cost]) -> list[dict[str, Any]]:
        return [{**asdict(cost), "kept": cost.kept._asdict()} for cost in costs]

    return {
        "recipe": profile.recipe.model_dump(),
        "device": profile.device,
        "threads": profile.num_threads,
        "tokens": profile.tokens,
        "parts": rows(profile.parts),
        "whole": rows([profile.whole])[0],
        "models": rows(profile.models),
        "notes": notes(profile),
    }


def metrics(profile: Profile) -> dict[str, float]:
    """The medians under names for MLflow: ``part/mixer_attention/forward_ms``, ``without/router_noise/…``."""
    found: dict[str, float] = {}
    for kind, costs in (("part", [*profile.parts, profile.whole]), ("without", profile.models)):
        for cost in costs:
            name = f"{kind}/{re.sub(r'[^a-z0-9]+', '_', cost.name.lower()).strip('_')}"
            found |= {
                f"{name}/forward_ms": quartiles(cost.forward_ms)[1],
                f"{name}/backward_ms": quartiles(cost.backward_ms)[1],
                f"{name}/memory_bytes": float(cost.memory),
                f"{name}/flops": float(sum(cost.flops)),
                f"{name}/parameters": float(cost.parameters),
            }
            if cost.beside:
                found[f"{name}/time_ratio"] = quartiles(time_ratios(cost))[1]
    return found


def figure(profile: Profile) -> Any:
    """Both tables as bars."""
    full = profile.models[0]
    parts = {
        cost.name: {
            "forward, ms": quartiles(cost.forward_ms)[1],
            "backward, ms": quartiles(cost.backward_ms)[1],
            "memory, MiB": cost.memory / 2**20,
            "MFLOP": sum(cost.flops) / 1e6,
        }
        for cost in profile.parts
    }
    without = {
        f"without {cost.name}": {
            "step, times full": quartiles(time_ratios(cost))[1],
            "memory, times full": cost.memory / full.memory,
            "FLOP, times full": sum(cost.flops) / sum(full.flops),
        }
        for cost in profile.models[1:]
    }
    return cost_figure(parts, without, f"{profile.recipe.run.name}: what each part costs")
