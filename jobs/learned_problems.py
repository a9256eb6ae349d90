"""Which problems a model has learned from, so that none of them is taken for held out."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from jobs import recipe_yaml
from jobs.checkpoint_folder import recipe_of
from jobs.recipe import Recipe, RecipeError
from jobs.task_source import load_tasks_of
from mmada.data.tasks import TaskItem, TaskSet
from mmada.errors import DataError

Question = tuple[str, str]  # family and question


def question_of(item: TaskItem) -> Question:
    """What makes two problems the same, whatever their prompts' template."""
    return item.family, item.entry["question"]


def learned_questions(checkpoint: str) -> set[Question]:
    """Questions that a checkpoint's run learned from, and those that it began with did, as far as recipes tell.

    Raises RecipeError for a recipe that cannot be read.
    """
    found: set[Question] = set()
    seen: set[Path] = set()
    while (saved := recipe_of(checkpoint)) is not None and saved not in seen:
        seen.add(saved)
        try:
            recipe = Recipe.model_validate(recipe_yaml.parse(saved.read_text(encoding="utf-8")))
            sections = [recipe.tasks, *(source.tasks for source in (recipe.data.sources or {}).values())]
            tasks = [load_tasks_of(section) for section in sections if section is not None]
            items = [item for each in tasks for item in each.train]
        except (OSError, ValueError, ValidationError, DataError) as error:
            raise RecipeError(
                f"checkpoint={checkpoint} lies in a run whose {saved} cannot be read; restore it"
            ) from error
        found |= {question_of(item) for item in items}
        start = recipe.ppo.start_from if recipe.ppo is not None else recipe.train.start_from
        if start is None:
            break
        checkpoint = start
    return found


def check_unseen(tasks: TaskSet, start: str | None, field: str) -> None:
    """Raise RecipeError where a held-out problem was learned from by the model that ``field`` begins with."""
    if start is None:
        return
    learned = learned_questions(start)
    known = sum(question_of(item) in learned for item in tasks.held_out)
    if known:
        raise RecipeError(
            f"{field}={start} has learned from {known} of the {len(tasks.held_out)} problems that tasks.held_out="
            f"{tasks.source.held_out} keeps apart here; use the tasks section that it was trained with"
        )
