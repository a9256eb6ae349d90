"""Losses weighed in every way: two workers with experts split do what one does, and a weight of 0 changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.recipe import Recipe, RecipeError
from jobs.recipe_checks import check
from mmada.model import MMaDAForCausalLM
from mmada.presets import build_config
from tests.jobs.workers import run_together, small_recipe

STEPS = 4
WEIGHTS = {"objectives.weights": "{calibration: 0.5}"}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a weight of 0": {"objectives.weights": "{calibration: 0.0}"},
    "measured": {"objectives.gradients_every": 1},
    "calibrated": WEIGHTS,
    "brier": WEIGHTS | {"objectives.calibration": "brier"},
    "uncertainty": WEIGHTS | {"objectives.combine": "uncertainty"},
    "gradnorm": WEIGHTS | {"objectives.combine": "gradnorm"},
    "project": {"objectives.weights": "{calibration: 30.0, router_z: 0.5}", "objectives.combine": "project"},
}
PAIRS = {"data.source": "tasks", "tasks.family": "coin_flip", "data.limit_documents": "null"}
ONE = {"cluster.workers": 1, "cluster.expert_parallel": 1, "train.zero_stage": 0}
TWO = {"cluster.workers": 2, "cluster.expert_parallel": 2}


def steps_of(rank: int, recipes: dict[Any, Recipe], prepared: Path) -> dict[Any, list[dict[str, float]]]:
    """The metrics of some steps under every recipe."""
    from jobs.worker import TrainingWorker

    found = {}
    for key, recipe in recipes.items():
        run_dir = recipe.run_dir / "-".join(map(str, key)).replace(" ", "-")
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        worker = TrainingWorker(recipe, run_dir, prepared, torch.device("cpu"), lambda message: None)
        found[key] = [worker.train_step(step) for step in range(STEPS)]
    return found


def recipe_for(folder: Path, kind: str, topology: dict[str, Any]) -> Recipe:
    every_expert = {"model.num_experts_per_tok": 4}  # rounding has no choice to flip
    return small_recipe(folder, **every_expert, **topology, **KINDS[kind])


@pytest.fixture(scope="module")
def found(prepared, tmp_path_factory) -> dict[Any, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("runs")
    one = {(kind, "one"): recipe_for(folder, kind, ONE) for kind in KINDS}
    two = {(kind, "two", 2): recipe_for(folder, kind, TWO | {"train.zero_stage": 2}) for kind in KINDS}
    two |= {("project", "two", 1): recipe_for(folder, "project", TWO | {"train.zero_stage": 1})}
    return run_together(1, steps_of, one, prepared)[0] | run_together(2, steps_of, two, prepared)[0]


def shown(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    prefixes = ("loss", "gradient_norm", "weight.", "calibration_error")
    return [{name: value for name, value in row.items() if name.startswith(prefixes)} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_do_what_one_does(kind, found):
    one = shown(found[kind, "one"])
    for key in [key for key in found if key[0] == kind and key[1] == "two"]:
        for step, (ours, theirs) in enumerate(zip(shown(found[key]), one, strict=True)):
            assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6), (key, step)


def test_a_weight_of_zero_and_looking_on_change_no_bit(found):
    plain = [(row["loss"], row["gradient_norm"]) for row in found["plain", "one"]]
    for kind in ("a weight of 0", "measured"):
        assert [(row["loss"], row["gradient_norm"]) for row in found[kind, "one"]] == plain
    assert not any(name.startswith("weight.") for name in found["a weight of 0", "one"][0])
    assert "calibration_error" not in found["a weight of 0", "one"][0]


def test_each_way_does_something(found):
    losses = {kind: found[kind, "one"][-1]["loss"] for kind in KINDS}
    assert len({round(losses[kind], 9) for kind in KINDS if kind not in ("a weight of 0", "measured")}) == 6
    first, last = found["uncertainty", "one"][0], found["uncertainty", "one"][-1]
    assert first["weight.language_model"] == 0.5 and last["weight.language_model"] < 0.5  # a loss above 1
    assert last["weight.calibration"] > first["weight.calibration"] == 0.25
    rows = found["project", "one"]
    coefficients = [row["weight.calibration"] / 30 for row in rows]
    assert any(abs(coefficient - 1) > 1e-6 for coefficient in coefficients)  # some gradients ran against each other


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"objectives.combine": "project", "train.zero_stage": 3},
            "objectives.combine=project looks at whole",
        ),
        ({"objectives.gradients_every": 5, "train.zero_stage": 3}, "objectives.gradients_every=5 looks at whole"),
        ({"objectives.combine": "gradnorm", "train.micro_batch": 1}, "leave train.micro_batch out"),
        ({"objectives.weights": "{calibrated: 1.0}"}, "objectives.weights.calibrated is no loss"),
        ({"objectives.weights": "{safety: 1.0}"}, "set objectives.safety_reference"),
        ({"objectives.weights": "{compute: 1.0}"}, "objectives.weights.compute prices gates"),
        (
            {"objectives.weights": "{safety: 0.0}", "objectives.safety_reference": "/nowhere"},
            "objectives.safety_reference=/nowhere is not a folder",
        ),
        (
            {"objectives.weights": "{router_z: 0.1}", "train.objective": "reward", **PAIRS},
            "objectives.weights.router_z has no part in train.objective=reward",
        ),
    ],
)
def test_what_cannot_be_is_refused(keys, said, tmp_path: Path):
    with pytest.raises(RecipeError, match=said):
        check(small_recipe(tmp_path, **keys))


def test_a_model_to_stay_near_has_the_same_vocabulary(tmp_path: Path):
    MMaDAForCausalLM(build_config("debug", num_experts=0, mlp_layer_types=None, vocab_size=300)).save_pretrained(
        tmp_path
    )
    keys = {"objectives.weights": "{safety: 1.0}", "objectives.safety_reference": tmp_path}
    with pytest.raises(RecipeError, match="compares 264 tokens with the 300 of objectives.safety_reference="):
        check(small_recipe(tmp_path / "runs", **keys))
