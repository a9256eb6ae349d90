"""One trial of a study: train one variant with one seed in this process, and measure it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.alone import train_alone
from jobs.bare_loop import BareLoop, text_batches
from jobs.entropy_model import settle_threshold
from jobs.model_building import build_model, model_config
from jobs.recipe import Recipe, load_recipe
from jobs.studies.policy import run_policy_trial
from jobs.studies.study import CalibrationTask, PolicyTask, RecallTaskSetting, Study, TargetTask, TextTask
from mmada.data import load_tokenizer, open_prepared
from mmada.data.recall import RecallTask
from mmada.model import MMaDAForCausalLM, count_parameters

EVALUATION_SEED = 2**31  # above every seed of a trial


@dataclass(frozen=True)
class Trial:
    """One variant with one seed; ``overrides`` come after its own. ``prepared``: folder of the text, if there is one.

    ``first``: folder of the model that the study trains first.
    """

    study: Study
    variant: str
    seed: int
    overrides: list[str]
    prepared: str | None
    first: str

    def recipe(self) -> Recipe:
        keys = [*self.study.overrides(self.variant, self.seed, self.first), *self.overrides]
        return load_recipe(self.study.recipe, keys)

    def recipe_in(self, run_dir: Path) -> Recipe:
        """The same, with all that it writes in this folder or beside it."""
        recipe = self.recipe()
        run = recipe.run.model_copy(update={"dir": str(run_dir.parent), "name": run_dir.name})
        return recipe.model_copy(update={"run": run})


def run_trial(trial: Trial) -> dict[str, float]:
    """Train and measure; every measure by name, and ``parameters``, ``loss`` of the last steps beside them.

    Runs with one thread, so that trials can share a machine.
    """
    torch.set_num_threads(1)
    study, recipe = trial.study, trial.recipe()
    if isinstance(study.task, PolicyTask):
        return {**run_policy_trial(trial), "parameters": float(count_parameters(model_config(recipe))[0])}
    if isinstance(study.task, TargetTask | CalibrationTask):
        run_dir = Path(trial.first).parent / f"{trial.variant.replace(' ', '-')}-{trial.seed}"
        rows = train_alone(trial.recipe_in(run_dir), run_dir)
        return {**study.task.of(rows), "parameters": float(count_parameters(model_config(recipe))[0])}
    folder = None if trial.prepared is None else Path(trial.prepared)
    loop = BareLoop(recipe, _batches(study.task, recipe, folder))
    if folder is not None:
        settle_threshold(loop.model, open_prepared(folder).train.rows(recipe.train.sequence_length), None)
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
    for length, name in zip(task.lengths, task.measures(), strict=False):
        rows = stream.rows(length)
        count = min(len(rows), task.held_out_tokens // length)
        per_pass = max(1, 4096 // length)
        nats, targets, patches = 0.0, 0.0, 0.0
        for first in range(0, count, per_pass):
            batch = rows.batch(range(first, min(first + per_pass, count)))  # type: ignore[arg-type]
            output = model(**batch, num_items_in_batch=1, use_cache=False)
            nats += output.lm_loss.item()
            targets += float((batch["shift_labels"] != -100).sum())
            patches += float(output.num_patches.sum()) if task.count_patches else 0.0
        measured[name] = nats / (math.log(2) * stream.num_bytes * targets / rows.num_targets)
        if task.count_patches:
            measured["bytes per patch"] = targets / patches
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
            right += int(((answers == labels) & (labels != -100)).sum())
            asked += int((labels != -100).sum())
        measured[name] = right / asked
    return measured


def save_untrained(recipe: Recipe, folder: Path) -> None:
    """The recipe's model as it is before training, as a Hugging Face folder."""
    build_model(recipe).save_pretrained(folder)
    load_tokenizer(recipe.data.tokenizer).save_pretrained(folder)


def train_first(recipe: Recipe, prepared: Path, folder: Path) -> None:
    """Train the recipe's model on prepared text and put its weights into ``folder``."""
    loop = BareLoop(recipe, text_batches(recipe, prepared))
    for step in range(recipe.train.steps):
        loop.step(step)
    loop.model.save_pretrained(folder)
