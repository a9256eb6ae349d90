"""From a recipe's ``tasks`` section to its problems."""

from __future__ import annotations

from functools import lru_cache

from jobs.recipe import Recipe
from jobs.recipe_schema_rl import TasksSection
from mmada.data.tasks import TaskSet, TaskSource, load_tasks
from mmada.errors import DataError


def task_source(tasks: TasksSection) -> TaskSource:
    """The section in the words of ``mmada.data``."""
    family = tasks.family if isinstance(tasks.family, str) else tuple(tasks.family)
    difficulty = tasks.difficulty if isinstance(tasks.difficulty, int) else tuple(tasks.difficulty)
    return TaskSource(
        family, difficulty, tasks.seed, tasks.size, tasks.held_out, config=tasks.config, template=tasks.template
    )


def load_recipe_tasks(recipe: Recipe) -> TaskSet:
    """The problems, drawn once in a process. Raises DataError."""
    if recipe.tasks is None:
        raise DataError("tasks.family is missing; name a task family of reasoning-gym, such as tasks.family=chain_sum")
    return load_tasks_of(recipe.tasks)


def load_tasks_of(section: TasksSection) -> TaskSet:
    """The problems of a section, drawn once in a process. Raises DataError."""
    return _load(section.model_dump_json())


@lru_cache(maxsize=8)
def _load(section: str) -> TaskSet:
    return load_tasks(task_source(TasksSection.model_validate_json(section)))
