"""Which objective a recipe asks for: ``train.objective`` x ``data.source``."""

from __future__ import annotations

from pathlib import Path

from jobs.objectives.mixture import MixtureObjective
from jobs.objectives.objective import Objective
from jobs.objectives.reward import RewardObjective
from jobs.objectives.tasks import TaskObjective
from jobs.objectives.text import TextObjective
from jobs.recipe import Recipe

OBJECTIVES: dict[tuple[str, str], type[Objective]] = {
    ("language_model", "stdlib"): TextObjective,
    ("language_model", "files"): TextObjective,
    ("language_model", "hub"): TextObjective,
    ("language_model", "tasks"): TaskObjective,
    ("language_model", "mixture"): MixtureObjective,
    ("reward", "tasks"): RewardObjective,
    ("reward", "files"): RewardObjective,
}


def objective_class(recipe: Recipe) -> type[Objective]:
    """The entry of a recipe that ``jobs.recipe_checks`` has passed."""
    return OBJECTIVES[recipe.train.objective, recipe.data.source]


def prepare_objective(recipe: Recipe) -> Objective:
    """In the driver: what is learned from, prepared and checked. Raises DataError or RecipeError."""
    objective = objective_class(recipe).prepare(recipe)
    objective.check_stages()
    return objective


def open_objective(recipe: Recipe, prepared: Path | None) -> Objective:
    """In a worker: the same, from the folder that the driver's ``prepared`` named."""
    return objective_class(recipe).open(recipe, prepared)
