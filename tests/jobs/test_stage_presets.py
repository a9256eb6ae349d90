"""Presets of stages: what they come to, and what of them cannot be had, in one line that names a remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.recipe import RecipeError, load_recipe
from jobs.recipe_checks import check, check_run
from jobs.recipe_schema import Recipe
from jobs.stage_presets import PRESETS
from jobs.stages import stages_of
from tests.jobs.test_recipe_stages import with_changes

TASKS: dict[str, Any] = {
    "source": "tasks",
    "difficulty": "level",
    "tasks": {"family": "chain_sum", "difficulty": [0, 1], "size": 40, "held_out": 4},
}
TEXT = {"source": "stdlib", "limit_documents": 40}
SOURCES = {"text": TEXT, "tasks": TASKS, "core": TASKS, "multi_hop": TASKS, "causal": TASKS}
REASONING = ["core", "multi-hop", "causal"]


def values_of(stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return with_changes(**{"data.sources": SOURCES, "train.stages": stages, **changes})


def read(folder: Path, values: dict[str, Any], *overrides: str) -> Recipe:
    path = folder / "preset.yaml"
    path.write_text(yaml.safe_dump(values))
    recipe = load_recipe(path, [f"run.dir={folder}", *overrides])
    check(recipe)
    return recipe


def test_the_presets_are_the_sources_own_curricula():
    lengths = {name: [(stage.name, stage.steps) for stage in stages] for name, stages in PRESETS.items()}
    assert lengths["reasoning"] == [("core", 1000), ("multi-hop", 2000), ("causal", 3000), ("multimodal", 5000)]
    assert lengths["multimodal"] == [("text", 10_000), ("alignment", 20_000), ("multimodal", 70_000)]
    names, steps = zip(*lengths["features"], strict=True)
    assert names == ("foundation", "enhanced", "metacognition") and [5 * each // steps[0] for each in steps] == [
        5,
        3,
        2,
    ]


def test_a_preset_becomes_a_list_of_stages_that_a_run_records(tmp_path: Path):
    recipe = read(tmp_path, values_of({"preset": "reasoning", "factor": 0.02, "only": REASONING}))
    core, hop, causal = stages_of(recipe, tuple(SOURCES))
    assert [stage.plan.name for stage in (core, hop, causal)] == REASONING
    assert [stage.plan.steps for stage in (core, hop, causal)] == [20, 40, 60] and recipe.train.steps == 120
    # Each goes on with what those before it read, and warms up over a twentieth of its steps, all but the first.
    assert (core.weights, hop.weights, causal.weights) == ((0, 0, 1, 0, 0), (0, 0, 1, 3, 0), (0, 0, 1, 1, 3))
    assert [stage.warmup_steps for stage in (core, hop, causal)] == [0, 2, 3]
    assert all(stage.plan.pacing is not None and stage.plan.pacing.kind == "root" for stage in (core, hop, causal))
    saved = tmp_path / "recipe.yaml"
    saved.write_text(recipe.resolved_yaml())
    assert load_recipe(saved) == recipe
    assert [stage["name"] for stage in yaml.safe_load(saved.read_text())["train"]["stages"]] == REASONING


def test_a_stage_that_is_left_out_leaves_its_source_out(tmp_path: Path):
    stages = {"preset": "reasoning", "factor": 0.01, "only": ["causal", "core"]}
    without = {name: source for name, source in SOURCES.items() if name != "multi_hop"}
    recipe = read(tmp_path, values_of(stages, **{"data.sources": without}))
    core, causal = recipe.train.stages or []
    assert (core.name, core.mixture, core.steps) == ("core", {"core": 1.0}, 10)
    assert (causal.name, causal.mixture, causal.steps) == ("causal", {"core": 1.0, "causal": 3.0}, 30)


def test_what_a_recipe_changes_counts(tmp_path: Path):
    changes = {"core": {"sequence_length": 96, "pacing": None}, "multi-hop": {"tokens": 8 * 128 * 7, "warmup_steps": 1}}
    stages = {"preset": "reasoning", "factor": 0.5, "only": REASONING[:2], "changes": changes}
    recipe = read(tmp_path, values_of(stages), "train.stages.factor=0.01", "train.stages.changes.core.global_batch=4")
    core, hop = stages_of(recipe, tuple(SOURCES))
    assert (core.plan.steps, core.sequence_length, core.global_batch, core.plan.pacing) == (10, 96, 4, None)
    assert (hop.plan.steps, hop.warmup_steps) == (7, 1)


def test_metacognition_weighs_confidence_and_the_price_of_gates(tmp_path: Path):
    routed = {"model": {"preset": "debug", "mixer_types": "hybrid", "hybrid": {"fusion": "routed"}}}
    recipe = read(tmp_path, values_of({"preset": "features", "factor": 0.01}, **routed))
    foundation, enhanced, metacognition = stages_of(recipe, tuple(SOURCES))
    assert (foundation.loss_weights, enhanced.loss_weights) == ({}, {})
    assert metacognition.loss_weights == {"calibration": (0.0, 0.1), "compute": (0.0, 0.1)}
    assert (foundation.weights, metacognition.weights) == ((1, 0, 0, 0, 0), (1, 1, 0, 0, 0))
    assert metacognition.learning_rate_factor == 0.5


def test_the_text_of_the_multimodal_curriculum_can_be_had(tmp_path: Path):
    recipe = read(tmp_path, values_of({"preset": "multimodal", "factor": 0.001, "only": ["text"]}))
    (text,) = stages_of(recipe, tuple(SOURCES))
    assert (text.plan.name, text.plan.steps, text.weights) == ("text", 10, (1, 0, 0, 0, 0))


WRONG = {
    "an unknown preset": ({"preset": "reasonning"}, "train.stages.preset=reasonning is no preset of stages; did you"),
    "no preset": ({"factor": 2}, "names no preset; write train.stages={preset: reasoning}, say, or a list"),
    "an unknown key": ({"preset": "features", "facter": 2}, "facter=2 is not a key of a preset; did you mean factor?"),
    "a number for a name": ({"preset": 3}, "train.stages.preset=3 is not text; quote it"),
    "a factor of zero": ({"preset": "features", "factor": 0}, "train.stages.factor=0 is out of range; use more than 0"),
    "a factor below zero": ({"preset": "features", "factor": -1}, "factor=-1 is out of range; use more than 0"),
    "a factor in words": ({"preset": "features", "factor": "small"}, "train.stages.factor='small' is not a number"),
    "a stage without a step": (
        {"preset": "features", "factor": 0.0001},
        "factor=0.0001 leaves no step of the 5000 of foundation; use 0.0005 or more",
    ),
    "none of its stages": ({"preset": "multimodal", "only": []}, "only=[] leaves no stage of multimodal; name text"),
    "a stage that it lacks": (
        {"preset": "features", "only": ["fundation"]},
        "train.stages.only=fundation is no stage of features; did you mean foundation?",
    ),
    "one name for a list": ({"preset": "features", "only": "foundation"}, "is not a list; write it in brackets"),
    "a stage of images": (
        {"preset": "reasoning"},
        "its stage multimodal needs images, which no source gives yet; leave it out with only: [core, multi-hop, caus",
    ),
    "nothing but images": ({"preset": "reasoning", "only": ["multimodal"]}, "leave it out with only: [core, multi-hop"),
    "stages of images": (
        {"preset": "multimodal"},
        "its stages alignment and multimodal need images, which no source gives yet; leave them out with only: [text]",
    ),
    "changes of a stage that is not run": (
        {"preset": "features", "only": ["foundation"], "changes": {"enhanced": {"steps": 3}}},
        "train.stages.changes.enhanced is no stage of this run; use foundation",
    ),
    "changes of a key that is not there": (
        {"preset": "features", "only": ["foundation"], "changes": {"foundation": {"step": 3}}},
        "train.stages.0.step=3 is not a key there; leave it out",
    ),
    "changes that are no section": (
        {"preset": "features", "changes": {"foundation": 3}},
        "train.stages.changes.foundation=3 is not a section; write its keys below it",
    ),
    "a price without gates": (
        {"preset": "features", "factor": 0.01},
        "train.stages.metacognition.loss_weights.compute prices gates that decide what is computed",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_one_line(what: str, tmp_path: Path):
    stages, said = WRONG[what]
    with pytest.raises(RecipeError) as error:
        read(tmp_path, values_of(stages))
    line = str(error.value)
    assert said in line and "\n" not in line and "; " in line, line


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({"core": TASKS}, "reads a source multi_hop at its stage multi-hop, and data.sources has core; define"),
        (None, "reads a source core at its stage core, and data.sources is not set; define data.sources.core"),
    ],
)
def test_a_source_that_is_missing_is_named(sources: dict[str, Any] | None, said: str, tmp_path: Path):
    values = values_of({"preset": "reasoning", "only": REASONING}, **{"data.sources": sources})
    with pytest.raises(RecipeError, match=said):
        read(tmp_path, values)


def test_a_run_does_not_go_on_with_other_stages(tmp_path: Path):
    values = values_of({"preset": "multimodal", "factor": 0.001, "only": ["text"]})
    recipe = read(tmp_path, values)
    recipe.run_dir.mkdir()
    (recipe.run_dir / "recipe.yaml").write_text(recipe.resolved_yaml())
    check_run(read(tmp_path, values, "run.resume=true"))
    with pytest.raises(
        RecipeError, match=r"train.stages=\[.*\.\.\. is not what run.name=staged began with; use that of"
    ):
        check_run(read(tmp_path, values, "run.resume=true", "train.stages.factor=0.002"))


def test_the_command_ends_with_two(tmp_path: Path):
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump(values_of({"preset": "reasoning"})))
    command = [sys.executable, "-m", "jobs.cli", "train", str(path), f"run.dir={tmp_path}"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (made.returncode, made.stdout) == (2, "")
    assert made.stderr.startswith("mmada: train.stages.preset=reasoning") and made.stderr.count("\n") == 1
    assert not (tmp_path / "staged").exists()
