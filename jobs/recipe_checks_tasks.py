"""What must fit together in a recipe that learns from tasks or preferences, or begins with trained weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.recipe import Recipe, RecipeError
from jobs.wording import shown

if TYPE_CHECKING:
    from mmada.config import MMaDAConfig

_TEXT_KEYS = ("path", "split", "config_name", "limit_documents")


def check_objective(recipe: Recipe) -> None:
    """What is learned goes with where it comes from. Raises RecipeError."""
    source, objective = recipe.data.source, recipe.train.objective
    if objective == "reward" and source not in ("tasks", "files"):
        raise RecipeError(
            f"train.objective=reward finds no pairs of completions in data.source={source}; use data.source=tasks, or "
            "files with prompt, chosen and rejected in JSONL at data.path"
        )
    if source == "tasks" and recipe.tasks is None:
        raise RecipeError(
            "tasks.family is missing, and data.source=tasks learns from it; name a task family of reasoning-gym, such "
            "as tasks.family=chain_sum"
        )
    if source != "tasks" and recipe.tasks is not None:
        raise RecipeError(
            f"tasks.family={shown(recipe.tasks.family)} has no part in data.source={source}; use data.source=tasks, or "
            "tasks=null to leave the section out"
        )


def check_task_data(recipe: Recipe) -> None:
    """Tasks take no keys of text. Raises RecipeError."""
    for key in _TEXT_KEYS:
        if (value := getattr(recipe.data, key)) is not None:
            raise RecipeError(
                f"data.{key}={shown(value)} has no meaning for data.source={recipe.data.source}; leave it out, or set "
                + ("tasks.size" if recipe.data.source == "tasks" else f"data.sources.….{key}")
            )


def check_threshold(recipe: Recipe, config: MMaDAConfig) -> None:
    """Patches whose threshold is found on text have text, or a model that knows it. Raises RecipeError."""
    is_open = config.patches.needs_entropy_model and config.patches.threshold is None
    has_text = recipe.train.objective == "language_model" and recipe.data.source != "tasks"
    if is_open and not has_text and recipe.train.start_from is None:
        raise RecipeError(
            "model.patches.threshold=null is found on text, and this recipe learns from none; set it, or "
            "train.start_from, whose threshold is then taken"
        )


def check_start(recipe: Recipe, config: MMaDAConfig) -> None:
    """``train.start_from`` fits the model. Raises RecipeError."""
    if recipe.train.start_from is not None:
        from jobs.objectives.registry import objective_class
        from jobs.start_weights import check_start_weights

        check_start_weights(recipe.train.start_from, "train.start_from", objective_class(recipe).model_class(), config)
