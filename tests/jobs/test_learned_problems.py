"""No problem that a model has learned from is taken for held out, whoever asks."""

from pathlib import Path

import pytest

from jobs.learned_problems import check_unseen, learned_questions, question_of
from jobs.recipe import RESOLVED_RECIPE, RecipeError, load_recipe
from jobs.task_source import load_recipe_tasks

SUMS = ["tasks.family=chain_sum", "tasks.config={min_terms: 2, max_terms: 2, max_digits: 1}", "tasks.size=40"]


def run_with(folder: Path, name: str, *keys: str, recipe: str = "debug") -> Path:
    """The folder of a run with that recipe, of which nothing but the recipe is there."""
    fixed = [f"run.dir={folder}", f"run.name={name}"]
    fixed += ["data.source=tasks", "data.limit_documents=null"] if recipe == "debug" else []
    recipe_read = load_recipe(recipe, [*fixed, *keys])
    recipe_read.run_dir.mkdir()
    (recipe_read.run_dir / RESOLVED_RECIPE).write_text(recipe_read.resolved_yaml())
    return recipe_read.run_dir


def test_questions_are_those_of_the_run_and_of_what_it_began_with(tmp_path: Path):
    warm_up = run_with(tmp_path, "warm-up", *SUMS, "tasks.held_out=10")
    better = run_with(
        tmp_path,
        "better",
        "tasks.family=spell_backward",
        "tasks.config={}",
        "tasks.size=20",
        f"ppo.start_from={warm_up}",
        recipe="ppo-debug",
    )
    sums = load_recipe_tasks(load_recipe(warm_up / RESOLVED_RECIPE))
    assert learned_questions(str(warm_up)) == {question_of(item) for item in sums.train}
    assert {family for family, _ in learned_questions(str(better))} == {"chain_sum", "spell_backward"}
    assert learned_questions(str(better / "checkpoints" / "step-00000002" / "model")) > learned_questions(str(warm_up))
    assert learned_questions(str(tmp_path)) == set()


def test_a_start_that_has_seen_what_is_held_out_here_is_refused(tmp_path: Path):
    warm_up = run_with(tmp_path, "warm-up", *SUMS, "tasks.held_out=10")

    def tasks(*keys: str):
        return load_recipe_tasks(load_recipe(warm_up / RESOLVED_RECIPE, keys))

    check_unseen(tasks(), str(warm_up), "ppo.start_from")
    check_unseen(tasks("tasks.held_out=30"), None, "ppo.start_from")
    with pytest.raises(RecipeError) as error:
        check_unseen(tasks("tasks.held_out=30"), str(warm_up), "ppo.start_from")
    line = f"ppo.start_from={warm_up} has learned from 20 of the 30 problems that tasks.held_out=30 keeps apart here"
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
