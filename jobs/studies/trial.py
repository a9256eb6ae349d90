"""One trial of a study: train one variant with one seed in this process, and measure it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from jobs.bare_loop import BareLoop, text_batches
from jobs.recipe import Recipe, load_recipe
from jobs.studies.study import RecallTaskSetting, Study, TextTask
from mmada.data import open_prepared
from mmada.data.recall import RecallTask
from mmada.model import MMaDAForCausalLM, count_parameters

EVALUATION_SEED = 2**31  # above every seed of a trial


def run_trial(study: Study, variant: str, seed: int, overrides: list[str], prepared: str | None) -> dict[str, float]:
    """Train and measure; every measure by name, and ``parameters``, ``loss`` of the last steps beside them.

    ``overrides`` come after the variant's own. Runs with one thread, so that trials can share a machine.
    """
    torch.set_num_threads(1)
    recipe = load_recipe(study.recipe, [*study.overrides(variant, seed), *overrides])
    folder = None if prepared is None else Path(prepared)
    loop = BareLoop(recipe, _batches(study.task, recipe, folder))
    losses = [loop.step(step)[0] for step in range(recipe.train.steps)]
    model = loop.model.eval()
    measured = _measure_text(study.task, model, folder) if folder else _measure_recall(study.task, model, recipe)
    last = losses[-max(1, len(losses) // 10) :]
    return {
        **measured,
        "loss": sum(last) / len(last),
        "parameters": float(count_parameters(model.config)[0]),
    }


def _batches(task: TextTask | RecallTaskSetting, recipe: Recipe, prepared: Path | None) -> Any:
    if prepared is not None:
        return text_batches(recipe, prepared)
    rows = _recall(task, recipe.train.sequence_length)
    return lambda step: rows.batch(recipe.run.seed, step, recipe.train.global_batch)


def _recall(task: Any, length: int) -> RecallTask:
    return RecallTask(num_pairs=task.num_pairs, length=length, num_symbols=task.num_symbols)


@torch.no_grad()
def _measure_text(task: Any, model: MMaDAForCausalLM, prepared: Path) -> dict[str, float]:
    """Held-out bits per byte at every length, over the same tokens."""
    stream, measured = open_prepared(prepared).held_out, {}
    for length, name in zip(task.lengths, task.measures(), strict=True):
        rows = stream.rows(length)
        count = min(len(rows), task.held_out_tokens // length)
        per_pass = max(1, 4096 // length)
        nats = targets = 0.0
        for first in range(0, count, per_pass):
            batch = rows.batch(range(first, min(first + per_pass, count)))  # type: ignore[arg-type]
            nats += model(**batch, num_items_in_batch=1, use_cache=False).lm_loss.item()
            targets += (batch["shift_labels"] != -100).sum().item()
        measured[name] = nats / (math.log(2) * stream.num_bytes * targets / rows.num_targets)
    return measured


@torch.no_grad()
def _measure_recall(task: Any, model: MMaDAForCausalLM, recipe: Recipe) -> dict[str, float]:
    """Share of the questions answered rightly at every length, on rows that no trial is trained on."""
    measured = {}
    for length, name in zip(task.lengths, task.measures(), strict=True):
        right = asked = 0
        for step in range(math.ceil(task.rows / 32)):
            batch = _recall(task, length).batch(EVALUATION_SEED + recipe.run.seed, step, 32)
            labels = batch["shift_labels"]
            answers = model(batch["input_ids"], use_cache=False).logits.argmax(dim=-1)
            right += ((answers == labels) & (labels != -100)).sum().item()
            asked += (labels != -100).sum().item()
        measured[name] = right / asked
    return measured
