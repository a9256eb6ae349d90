"""Which objective a recipe asks for: ``train.objective`` x ``data.source``."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name

from jobs.objectives.objective import Objective
from jobs.recipe import Recipe

# Modules and classes, imported when a recipe asks for them.
OBJECTIVES = {
    ("language_model", "stdlib"): "jobs.objectives.text:TextObjective",
    ("language_model", "files"): "jobs.objectives.text:TextObjective",
    ("language_model", "hub"): "jobs.objectives.text:TextObjective",
    ("language_model", "tasks"): "jobs.objectives.tasks:TaskObjective",
    ("language_model", "mixture"): "jobs.objectives.mixture:MixtureObjective",
    ("reward", "tasks"): "jobs.objectives.reward:RewardObjective",
    ("reward", "files"): "jobs.objectives.reward:RewardObjective",
}


def objective_class(recipe: Recipe) -> type[Objective]:
    """The entry of a recipe that ``jobs.recipe_checks`` has passed."""
    return resolve_name(OBJECTIVES[recipe.train.objective, recipe.data.source])


def prepare_objective(recipe: Recipe) -> Objective:
    """In the driver: what is learned from, prepared and checked. Raises DataError or RecipeError."""
    objective = objective_class(recipe).prepare(recipe)
    objective.check_stages()
    return objective


def open_objective(recipe: Recipe, prepared: Path | None) -> Objective:
    """In a worker: the same, from the folder that the driver's ``prepared`` named."""
    return objective_class(recipe).open(recipe, prepared)
