"""The policy that reinforcement learning begins with, and stays close to."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.checkpoint_folder import model_folder
from jobs.model_building import build_model, model_config
from jobs.recipe import Recipe, RecipeError
from jobs.wording import shown
from mmada.config import MMaDAConfig
from mmada.data import load_tokenizer


def write_reference(recipe: Recipe, folder: Path) -> None:
    """Write the first policy as a Hugging Face folder: that of ``ppo.start_from``, or fresh weights.

    Written aside and then renamed, so that a folder of this name is whole.
    """
    assert recipe.ppo is not None
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    if recipe.ppo.start_from is not None:
        shutil.copytree(model_folder(recipe.ppo.start_from), aside)
    else:
        model = build_model(recipe)
        model.save_pretrained(aside)
        load_tokenizer(recipe.data.tokenizer).save_pretrained(aside)
    aside.rename(folder)


def check_start_from(recipe: Recipe) -> None:
    """Raise RecipeError unless ``ppo.start_from`` holds a model of the recipe's own architecture.

    ``model_folder`` raises ClusterError where it holds none.
    """
    assert recipe.ppo is not None
    if recipe.ppo.start_from is None:
        return
    saved: Any = MMaDAConfig.from_pretrained(model_folder(recipe.ppo.start_from))
    wanted: Any = model_config(recipe)
    for name in sorted(MMaDAConfig.architecture_fields()):
        theirs, ours = getattr(saved, name, None), getattr(wanted, name, None)
        if name == "patches" and ours is not None and theirs is not None and ours.threshold is None:
            ours = replace(ours, threshold=theirs.threshold)  # left to the text that the model was trained on
        if theirs != ours:
            raise RecipeError(
                f"model.{name}={shown(ours)} is not what ppo.start_from={recipe.ppo.start_from} has "
                f"({shown(theirs)}); use the model section that it was trained with"
            )
