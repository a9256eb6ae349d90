"""With how many workers a run may go on, and what its recipe for so many says."""

import pytest

from jobs.recipe import Recipe, RecipeError, load_recipe
from jobs.recipe_checks_nodes import check_min_workers
from jobs.shrinking import possible_workers, ppo_for, training_for


def debug(**overrides: object) -> Recipe:
    keys = {"cluster.workers": 8, "cluster.expert_parallel": 1, "train.global_batch": 24} | overrides
    return load_recipe("debug", [f"{key}={value}" for key, value in keys.items()])


def stage(name: str, rows: int) -> str:
    return f"{{name: {name}, steps: 10, global_batch: {rows}}}"


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ({}, (8,)),  # never fewer, unless it is said
        ({"cluster.min_workers": 8}, (8,)),
        ({"cluster.min_workers": 1}, (1, 2, 3, 4, 6, 8)),
        ({"cluster.min_workers": 3}, (3, 4, 6, 8)),
        # Rows of a worker are whole micro batches: 24 rows over 3 are 8, over 8 they are 3.
        ({"cluster.min_workers": 1, "train.micro_batch": 3}, (1, 2, 4, 8)),
        ({"cluster.min_workers": 1, "train.stages": f"[{stage('a', 24)}, {stage('b', 40)}]"}, (1, 2, 4, 8)),
    ],
)
def test_batches_must_divide(overrides, sizes):
    assert possible_workers(debug(**overrides), training_for) == sizes


def test_fewer_workers_share_the_same_batch_in_passes_of_the_same_size():
    recipe = debug(**{"cluster.expert_parallel": 4})
    assert training_for(recipe, 8) is recipe and recipe.train.micro_batch is None
    found = {
        workers: (fewer.rows_per_worker, fewer.micro_batch, fewer.accumulation, fewer.cluster.expert_parallel)
        for workers in (6, 4, 3, 1)
        for fewer in [training_for(recipe, workers)]
    }
    # No more than the 3 rows of a worker out of 8, and a whole number of passes.
    assert found == {6: (4, 2, 2, 2), 4: (6, 3, 2, 4), 3: (8, 2, 4, 1), 1: (24, 3, 8, 1)}
    auto = training_for(debug(**{"train.micro_batch": "auto"}), 4)
    assert auto.train.micro_batch == "auto"  # the workers look for themselves
    with pytest.raises(RecipeError, match="not divisible by cluster.workers=5"):
        training_for(recipe, 5)


def test_stages_have_passes_that_fit_all_of_them():
    recipe = debug(**{"train.stages": f"[{stage('a', 24)}, {stage('b', 40)}]"})
    assert training_for(recipe, 2).train.micro_batch == 2  # of 12 and 20 rows; a worker out of 8 had 3 and 5
    assert training_for(recipe, 1).train.micro_batch == 2  # 24 and 40 have 8, 4 and 2 in common


def test_learners_share_minibatches():
    keys = ["cluster.workers=4", "cluster.expert_parallel=1", "cluster.min_workers=1", "cluster.max_failures=1"]
    recipe = load_recipe("ppo-debug", [*keys, "ppo.minibatch=12"])
    assert possible_workers(recipe, ppo_for) == (1, 2, 3, 4)
    assert [ppo_for(recipe, workers).ppo.micro_batch for workers in (1, 2, 3, 4)] == [3, 3, 2, None]
    assert possible_workers(load_recipe("ppo-debug", [*keys, "ppo.minibatch=8"]), ppo_for) == (1, 2, 4)


def test_min_workers_that_cannot_be_meant_are_refused():
    check_min_workers(debug(**{"cluster.min_workers": 8, "cluster.max_failures": 0}))
    check_min_workers(debug(**{"cluster.min_workers": 4}))
    with pytest.raises(RecipeError, match=r"^cluster\.min_workers=9 is more than cluster\.workers=8; use at most 8"):
        check_min_workers(debug(**{"cluster.min_workers": 9}))
    with pytest.raises(RecipeError, match=r"^cluster\.min_workers=4 has no effect with cluster\.max_failures=0"):
        check_min_workers(debug(**{"cluster.min_workers": 4, "cluster.max_failures": 0}))
