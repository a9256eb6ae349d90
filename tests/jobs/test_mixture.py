"""Several sources in one run: what the driver, the workers, a plan and an evaluation make of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs import cli
from jobs.learned_problems import learned_questions
from jobs.objectives.mixture import MixtureObjective
from jobs.objectives.registry import prepare_objective
from jobs.plan import batch_arithmetic
from jobs.recipe import RESOLVED_RECIPE, Recipe, RecipeError, load_recipe
from jobs.worker_recipe import recipe_for_workers
from mmada.errors import DataError
from tests.jobs.test_recipe_stages import read, with_changes
from tests.jobs.workers import run_all


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("runs")
    stages: list[dict[str, Any]] = [
        {"name": "all", "steps": 3},
        {"name": "sums", "steps": 2, "mixture": {"sums": 1.0}, "loss_weights": {"calibration": 0.0}},
    ]
    return read(folder, with_changes(**{"train.stages": stages, "train.evaluate_every": 0, "train.zero_stage": 1}))


@pytest.fixture(scope="module")
def objective(recipe: Recipe) -> MixtureObjective:
    found = prepare_objective(recipe)
    assert isinstance(found, MixtureObjective)
    return found


def test_rows_of_all_sources_have_the_same_tensors(objective: MixtureObjective):
    batches = [objective.rows_of(name, 96).batch(np.array([0, 1])) for name in ("text", "sums")]
    assert batches[0].keys() == batches[1].keys()
    assert {name: value.shape for name, value in batches[0].items()} == {name: (2, 96) for name in batches[1]}
    assert batches[0]["attention_mask"].all() and not batches[1]["attention_mask"].all()


def test_difficulty_follows_levels_and_compression(objective: MixtureObjective):
    shares, items = objective.shares_of("sums", 128), objective.parts["sums"].tasks.train
    assert shares is not None and len(shares) == len(items) == 300
    for level, low, high in ((0, 0.0, 1 / 3), (1, 1 / 3, 2 / 3), (2, 2 / 3, 1.0)):
        own = [share for share, item in zip(shares, items, strict=True) if item.level == level]
        assert low < min(own) and max(own) < high
    text = objective.shares_of("text", 128)
    assert text is not None and sorted(text) == pytest.approx((np.arange(len(text)) + 0.5) / len(text))


def test_a_run_learns_from_both_and_measures_each(recipe: Recipe, capsys, monkeypatch):
    run_dir = recipe.run_dir
    ((rows, _, _),) = run_all([(recipe, run_dir, 99)], run_dir.parent)
    last = rows[-1]
    assert [row["stage"] for row in rows] == [1, 1, 1, 2, 2]
    bits = [last["bits_per_byte.text"], last["bits_per_answer_byte.sums"]]
    assert last["held_out_bits"] == pytest.approx(sum(bits) / 2) and all(map(math.isfinite, bits))
    assert last["held_out_accuracy"] == last["held_out_accuracy.sums"]
    assert MixtureObjective.evaluated(recipe) <= last.keys()  # what a stage may listen to is measured
    # That a stage weighs it, if only with 0, asks for it.
    assert {
        f"{key}.{name}" for key in ("temperature", "scaled_calibration_error") for name in ("text", "sums")
    } <= last.keys()
    levels = [last[f"held_out_accuracy.level_{level}.sums"] for level in (0, 1, 2)]
    assert sum(levels) / 3 == pytest.approx(last["held_out_accuracy.sums"])  # as many problems of each
    (run_dir / RESOLVED_RECIPE).write_text(recipe.resolved_yaml())
    monkeypatch.chdir(run_dir.parent)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", str(run_dir), "--json", "found.json"])
    assert ended.value.code == 0, capsys.readouterr()
    found = json.loads(Path("found.json").read_text())
    assert found["text"]["bits_per_byte"] == pytest.approx(bits[0], rel=1e-3)
    assert found["sums"]["accuracy"]["mean"] == last["held_out_accuracy.sums"]
    assert len(learned_questions(str(run_dir))) > 200


def test_workers_find_what_is_named_from_where_the_user_stands(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("texts", "small"):
        (tmp_path / name).mkdir()
    text = {"source": "files", "path": "texts", "difficulty": "loss", "difficulty_model": "small"}
    changes = {"data.sources.text": text}
    path = tmp_path / "mixed.yaml"
    path.write_text(yaml.safe_dump(with_changes(**changes)))
    source = recipe_for_workers(load_recipe(path))["data"]["sources"]["text"]
    assert (source["path"], source["difficulty_model"]) == (str(tmp_path / "texts"), str(tmp_path / "small"))


def test_a_plan_counts_the_tokens_of_every_stage(tmp_path: Path):
    recipe = read(tmp_path, with_changes())
    assert batch_arithmetic(recipe, None).tokens_in_run == 10 * 8 * 128 + 10 * 8 * 64 + 20 * 16 * 128


def test_problems_longer_than_a_stages_rows_are_refused_before_anything_starts(tmp_path: Path):
    stages = [{"name": "short", "steps": 2, "sequence_length": 24}]
    with pytest.raises((DataError, RecipeError), match="sequence_length=24 is too short for problem"):
        prepare_objective(read(tmp_path, with_changes(**{"train.stages": stages})))
