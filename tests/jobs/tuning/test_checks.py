"""A search that cannot be carried out is refused before anything starts, in one line: field, value, remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.recipe import RESOLVED_RECIPE, RecipeError, load_values
from jobs.recipe_checks import check_run
from jobs.recipe_checks_tune import COMPARED, check_tune

RATE = "tune.space.train.learning_rate"

WRONG = [
    (["tune=null"], "tune.space is missing"),
    (["tune.space={}"], "tune.space={} is empty"),
    ([f"{RATE}={{}}"], f"{RATE} has no distribution; give exactly one of uniform"),
    ([f"{RATE}={{uniform: [0, 1], choice: [1]}}"], f"{RATE} has uniform and choice; give exactly one"),
    ([f"{RATE}={{normal: [0, 1]}}"], f"{RATE}.normal=[0, 1] is not a key there"),
    ([f"{RATE}={{uniform: [1, 0]}}"], f"{RATE}.uniform=[1.0, 0.0] has no room"),
    ([f"{RATE}={{uniform: [1]}}"], f"{RATE}.uniform="),
    ([f"{RATE}={{loguniform: [0, 1]}}"], f"{RATE}.loguniform=[0.0, 1.0] has no logarithm at 0"),
    ([f"{RATE}={{quniform: [0.1, 1, 0.3]}}"], "has an end that is no multiple of its step; use 0 instead of 0.1"),
    ([f"{RATE}={{quniform: [0, 1, 0]}}"], "has no step; give a third number above 0"),
    ([f"{RATE}={{choice: [0.1, 0.1]}}"], "names a value twice"),
    ([f"{RATE}={{uniform: [0.1, 1], step: 0.1}}"], f"{RATE}.step=0.1 goes with simplex, not uniform"),
    (["tune.space.objectives.weights={simplex: [calibration]}"], "tune.space.objectives.weights.simplex="),
    (["tune.space.objectives.weights={simplex: [a, a]}"], "has a name twice"),
    (["tune.space.objectives.weights={simplex: [a, b], step: 0.7}"], "step=0.7 does not cut total=1"),
    (["tune.space.train.*.steps={randint: [1, 5]}"], "holds a *, which is for the names of a simplex"),
    (["tune.space.run.name={choice: [a, b]}"], "tune.space.run.name cannot be searched"),
    (["tune.space.cluster.workers={choice: [1, 2]}"], "tune.space.cluster.workers cannot be searched"),
    (
        ["tune.space.trian.steps={randint: [1, 5]}"],
        "tune.space.trian.steps is no section.key of a recipe; did you mean",
    ),
    (["tune.space.train.lerning_rate={uniform: [0.1, 1]}"], "tune.space allows what no run can be: train.lerning_rate"),
    (["tune.space.train.steps={randint: [0, 5]}"], "tune.space allows what no run can be: train.steps=0"),
    (["tune.space.train.global_batch={choice: [8, 7]}", "cluster.workers=2"], "tune.space allows what no run can be"),
    (["tune.space.train.stages.a.steps={randint: [1, 5]}"], "train.stages"),
    (["tune.metric=bits"], "tune.metric=bits is never evaluated; use bits_per_byte"),
    (["tune.mode=least"], "tune.mode='least' is not one of min, max"),
    (["tune.search=grid"], f"tune.search=grid needs an end of values, and {RATE} has none"),
    (
        ["tune.search=grid", f"{RATE}={{choice: [1e-3, 1e-2]}}", "tune.trials=3"],
        "tune.trials=3 is not the 4 combinations of tune.search=grid",
    ),
    (
        ["tune.search=grid", f"{RATE}=null", "tune.trials=null", "tune.space.train.warmup_steps={randint: [0, 1500]}"],
        "tune.search=grid has 3002 combinations",
    ),
    (["train.evaluate_every=0"], "tune.scheduler=asha hears nothing of trials before they end"),
    (["tune.grace_period=24"], "tune.grace_period=24 is as long as the longest trial (24 steps)"),
    (["tune.scheduler=none"], "tune.grace_period=8 goes with a tune.scheduler that stops trials"),
    (["tune.scheduler=pbt"], "tune.space.train.weight_decay cannot change while a run goes on"),
    (
        ["tune.scheduler=pbt", "tune.space.train.weight_decay=null", "train.checkpoint_every=5"],
        "train.checkpoint_every=5 leaves evaluations without a checkpoint to carry",
    ),
    (["tune.scheduler=pbt", "tune.space.train.weight_decay=null", "tune.search=optuna"], "pbt draws by itself"),
    (["tune.verb=ppo"], "ppo.iterations is missing"),
    (["tune.trials=0"], "tune.trials=0 is out of range"),
    (["tune.reduction_factor=1"], "tune.reduction_factor=1 is out of range"),
    (["model.preset=huge"], "model.preset='huge' is not a known size"),
]


@pytest.mark.parametrize(("overrides", "expected"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_wrong_searches(overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as refused:
        check_tune(load_values("tune-debug", overrides))
    message = str(refused.value)
    assert expected in message and "\n" not in message


def test_what_a_search_comes_to() -> None:
    search = check_tune(load_values("tune-debug"))
    assert (search.metric, search.mode, search.trials, search.most_steps) == ("bits_per_byte", "min", 4, 24)
    assert "tune" not in search.values
    longest = check_tune(load_values("tune-debug", ["tune.space.train.steps={randint: [10, 40]}"]))
    assert longest.most_steps == 40
    grid = check_tune(
        load_values("tune-debug", ["tune.search=grid", "tune.trials=null", f"{RATE}={{choice: [1e-3, 3e-3, 1e-2]}}"])
    )
    assert grid.trials == 6


def test_a_setting_lands_where_the_recipe_has_it() -> None:
    search = check_tune(load_values("tune-debug"))
    values = search.values_with({"train.learning_rate": 0.5, "objectives.weights.calibration": 0.1})
    assert values["train"]["learning_rate"] == 0.5 and values["train"]["steps"] == 24
    assert values["objectives"] == {"weights": {"calibration": 0.1}}
    assert search.values["train"]["learning_rate"] == 3e-4  # the recipe itself stays


def test_trials_of_a_sweep_that_goes_on_stay_comparable(tmp_path: Path) -> None:
    keys = [f"run.dir={tmp_path}", "run.name=begun"]
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / RESOLVED_RECIPE).write_text(check_tune(load_values("tune-debug", keys)).recipe.resolved_yaml())
    resumed = [*keys, "run.resume=true"]
    check_run(check_tune(load_values("tune-debug", [*resumed, "tune.max_concurrent=1"])).recipe, COMPARED)
    for key in ("train.steps=48", "train.evaluate_every=4", "train.evaluate_rows=8"):
        with pytest.raises(RecipeError, match=f"^{key} is not what run.name=begun began with; use "):
            check_run(check_tune(load_values("tune-debug", [*resumed, key])).recipe, COMPARED)
