"""The policy that reinforcement learning begins with, and stays close to."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.checkpoints import CheckpointStore
from jobs.checkpoint_folder import holds_reward_model, model_folder
from jobs.model_building import build_model, model_config
from jobs.recipe import Recipe, RecipeError
from jobs.start_weights import check_start_weights, start_folder
from jobs.wording import shown
from mmada.config import MMaDAConfig
from mmada.data import load_tokenizer

REFERENCE = "reference"  # folder of the run, and of its checkpoints, that holds the policy it began with


def write_reference(recipe: Recipe, folder: Path) -> None:
    """Write the first policy as a Hugging Face folder: the one that a resumed run's checkpoint holds, else that of
    ``ppo.start_from``, or fresh weights.

    Written aside and then renamed, so that a folder of this name is whole.
    """
    assert recipe.ppo is not None
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    if (saved := saved_reference(recipe)) is not None:
        copy_files(saved, aside)
    elif recipe.ppo.start_from is not None:
        copy_files(model_folder(recipe.ppo.start_from, "ppo.start_from"), aside)
    else:
        model = build_model(recipe)
        model.save_pretrained(aside)
        load_tokenizer(recipe.data.tokenizer).save_pretrained(aside)
    aside.rename(folder)


def copy_files(source: Path, target: Path) -> None:
    """A model's own files: what tools keep in folders beside them (.git, .cache) is none of it."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            shutil.copy2(file, target / file.name)


def saved_reference(recipe: Recipe) -> Path | None:
    """The first policy as a resumed run has it: in its own folder, or in its newest good checkpoint."""
    if not recipe.run.resume:
        return None
    if (own := recipe.run_dir / REFERENCE).is_dir():
        return own
    newest = CheckpointStore(recipe.run_dir / "checkpoints").newest_good(lambda damaged: None)
    return newest / REFERENCE if newest is not None and (newest / REFERENCE).is_dir() else None


def check_start_from(recipe: Recipe) -> None:
    """Raise RecipeError unless ``ppo.start_from`` holds a language model of the recipe's own architecture.

    A resumed run that has its first policy needs it no more.
    """
    assert recipe.ppo is not None
    start = recipe.ppo.start_from
    if start is None or saved_reference(recipe) is not None:
        return
    folder = start_folder(start, "ppo.start_from")
    if holds_reward_model(folder):
        raise RecipeError(f"ppo.start_from={start} holds a reward model; give a language model")
    saved: Any = MMaDAConfig.from_pretrained(folder)
    wanted: Any = model_config(recipe)
    for name in sorted(MMaDAConfig.architecture_fields()):
        theirs, ours = getattr(saved, name, None), getattr(wanted, name, None)
        if name == "patches" and ours is not None and theirs is not None and ours.threshold is None:
            ours = replace(ours, threshold=theirs.threshold)  # left to the text that the model was trained on
        if theirs != ours:
            raise RecipeError(
                f"model.{name}={shown(ours)} is not what ppo.start_from={start} has "
                f"({shown(theirs)}); use the model section that it was trained with"
            )
    from mmada.model import MMaDAForCausalLM

    check_start_weights(start, "ppo.start_from", MMaDAForCausalLM, saved)
