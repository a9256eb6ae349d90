"""Recipes with stages: what is understood, and what is refused, in one line that names field, value and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.recipe import RecipeError, load_recipe
from jobs.recipe_checks import check
from jobs.stages import stages_of

BASE: dict[str, Any] = {
    "run": {"name": "staged"},
    "model": {"preset": "debug", "num_experts": 0, "mlp_layer_types": None},
    "data": {
        "source": "mixture",
        "sources": {
            "text": {"source": "stdlib", "limit_documents": 40, "difficulty": "compression"},
            "sums": {
                "source": "tasks",
                "difficulty": "level",
                "tasks": {"family": "chain_sum", "difficulty": [0, 1, 2], "size": 300, "held_out": 30},
            },
        },
    },
    "train": {
        "sequence_length": 128,
        "global_batch": 8,
        "evaluate_every": 5,
        "stages": [
            {"name": "core", "steps": 10, "mixture": {"text": 1.0}},
            {
                "name": "sums",
                "tokens": 8 * 64 * 10,
                "sequence_length": 64,
                "mixture": {"text": 1.0, "sums": 3.0},
                "difficulty": [0.0, 0.7],
                "pacing": {"kind": "gated", "metric": "held_out_accuracy.sums", "threshold": 0.8},
                "advance": {"when": "threshold", "metric": "held_out_bits", "threshold": 2.0},
                "loss_weights": {"calibration": [0.0, 0.1]},
                "frozen": ["embeddings", "model.layers.0.*"],
            },
            {"name": "both", "steps": 20, "global_batch": 16, "warmup_steps": 5, "learning_rate_factor": 0.5},
        ],
    },
}


def with_changes(**changes: Any) -> dict[str, Any]:
    """The base with values set at dotted places: ``{"train.stages.1.steps": 5}``; None takes a key away."""
    values = yaml.safe_load(yaml.safe_dump(BASE))
    for place, value in changes.items():
        *outer, last = place.split(".")
        target = values
        for part in outer:
            target = target[int(part)] if part.isdigit() else target[part]
        if value is None:
            target.pop(last)
        else:
            target[int(last) if last.isdigit() else last] = value
    return values


def read(folder: Path, values: dict[str, Any]):
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump(values))
    recipe = load_recipe(path, [f"run.dir={folder}"])
    check(recipe)
    return recipe


def test_stages_are_understood(tmp_path: Path):
    recipe = read(tmp_path, BASE)
    assert recipe.train.steps == 10 + 10 + 20
    core, sums, both = stages_of(recipe, ["text", "sums"])
    assert (core.weights, core.sequence_length, core.global_batch, core.plan.steps) == ((1.0, 0.0), 128, 8, 10)
    assert (sums.weights, sums.sequence_length, sums.plan.steps) == ((1.0, 3.0), 64, 10)
    assert sums.plan.difficulty == (0.0, 0.7) and sums.loss_weights == {"calibration": (0.0, 0.1)}
    assert sums.plan.advance is not None and sums.plan.advance.lower_is_better
    assert sums.plan.pacing is not None and not sums.plan.pacing.lower_is_better
    assert (both.weights, both.global_batch, both.warmup_steps) == ((1.0, 1.0), 16, 5)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.resolved_yaml())
    assert load_recipe(again) == recipe


def test_a_recipe_without_stages_is_one_stage():
    recipe = load_recipe("debug")
    (stage,) = stages_of(recipe, ["stdlib"])
    assert (stage.plan.steps, stage.weights, stage.global_batch) == (20, (1.0,), recipe.train.global_batch)


STAGE = "train.stages.1"
WRONG = {
    "a length of zero": ({"train.stages.0.steps": 0}, "train.stages.0.steps=0 is out of range; use at least 1"),
    "no length": ({"train.stages.0.steps": None}, "train.stages.core has neither steps nor tokens; give one"),
    "two lengths": ({"train.stages.0.tokens": 9}, "train.stages.core has steps and tokens; give one"),
    "no stage": ({"train.stages": []}, "train.stages=[] is empty; give at least one"),
    "steps that do not add up": ({"train.steps": 41}, "train.steps=41 is not what train.stages come to together, 40"),
    "a name twice": ({"train.stages.2.name": "core"}, "train.stages: name=core stands twice"),
    "an unknown key": ({f"{STAGE}.step": 3}, "train.stages.1.step=3 is not a key there; leave it out"),
    "a negative weight": ({f"{STAGE}.mixture": {"text": -1.0}}, "mixture.text=-1.0 is out of range; use at least 0"),
    "an unknown source": ({f"{STAGE}.mixture": {"texts": 1.0}}, "mixture.texts is no source; did you mean text?"),
    "weights of nothing": ({f"{STAGE}.mixture": {"text": 0.0}}, "weighs nothing; give a source a weight above 0"),
    "a range that ends before it begins": ({f"{STAGE}.difficulty": [0.7, 0.2]}, "difficulty=[0.7, 0.2] is empty"),
    "a range outside of all": ({f"{STAGE}.difficulty": [0.0, 1.5]}, "is out of range; use 0 to 1"),
    "a range of one number": ({f"{STAGE}.difficulty": [0.5]}, "train.stages.1.difficulty=[0.5]"),
    "a gate that nobody measures": (
        {f"{STAGE}.advance.metric": "held_out_acuracy.sums"},
        "advance.metric=held_out_acuracy.sums is never evaluated; did you mean held_out_accuracy.sums?",
    ),
    "a gate on a level that is not there": (
        {f"{STAGE}.pacing.metric": "held_out_accuracy.sums.7"},
        "pacing.metric=held_out_accuracy.sums.7 is never evaluated",
    ),
    "a gate without evaluations": ({"train.evaluate_every": 0}, "is not evaluated within the stage's 10 steps"),
    "a gate after the stage": ({"train.evaluate_every": 11}, "(train.evaluate_every=11); use train.evaluate_every=2"),
    "a gate without a metric": ({f"{STAGE}.pacing.metric": None}, "pacing.metric=null with kind=gated; name a metric"),
    "a metric without a gate": ({f"{STAGE}.pacing.kind": "linear"}, "with kind=linear; leave it out"),
    "a threshold without its number": ({f"{STAGE}.advance.threshold": None}, "threshold=null with when=threshold"),
    "a plateau with a threshold": ({f"{STAGE}.advance.when": "plateau"}, "threshold=2.0 with when=plateau"),
    "an unknown pacing": ({f"{STAGE}.pacing.kind": "cubic"}, "kind='cubic' is not one of linear, root, source, gated"),
    "frozen names that match nothing": ({f"{STAGE}.frozen": ["model.layer.0.*"]}, "matches no parameter of this model"),
    "everything frozen": ({f"{STAGE}.frozen": ["*"]}, "leaves nothing to learn; leave a part out"),
    "an unknown loss": (
        {f"{STAGE}.loss_weights": {"calibrate": 1.0}},
        "is no loss; did you mean calibration?",
    ),
    "a loss of later": ({f"{STAGE}.loss_weights": {"contrastive": 1.0}}, "has nothing to be computed from yet"),
    "safety without a model": ({f"{STAGE}.loss_weights": {"safety": 1.0}}, "set objectives.safety_reference to one"),
    "operations without gates": (
        {f"{STAGE}.loss_weights": {"compute": 1.0}},
        "sums.loss_weights.compute prices gates that decide what is computed, and this model has none; use model.mixer",
    ),
    "a batch that does not divide": (
        {"train.stages.2.global_batch": 9, "cluster": {"workers": 2}},
        "global_batch=9 is not divisible by cluster.workers=2; use 10",
    ),
    "a micro batch that does not divide": (
        {"train.stages.2.global_batch": 12, "train.micro_batch": 8},
        "leaves a worker 12 rows, which train.micro_batch=8 does not divide",
    ),
    "rows longer than positions": (
        {f"{STAGE}.sequence_length": 9999, f"{STAGE}.tokens": None, f"{STAGE}.steps": 10},
        "train.stages.sums.sequence_length=9999 is more than model.max_position_embeddings",
    ),
    "a warm-up longer than the stage": ({"train.stages.0.warmup_steps": 10}, "warmup_steps=10 is not less than its 10"),
    "a factor of nothing": ({"train.stages.2.learning_rate_factor": 0.0}, "use more than 0"),
    "pacing without difficulties": (
        {"data.sources.text.difficulty": None, "data.sources.sums.difficulty": None},
        "has no difficulties to go by",
    ),
    "levels of text": ({"data.sources.text.difficulty": "level"}, "data.sources.text.difficulty=level finds no levels"),
    "lengths of packed text": ({"data.sources.text.difficulty": "length"}, "is the same for all rows of packed text"),
    "a loss without its model": ({"data.sources.text.difficulty": "loss"}, "set it to a trained small model"),
    "tasks without problems": (
        {"data.sources.sums.tasks": None},
        "source=tasks with tasks=null; give its tasks",
    ),
    "sources that nobody mixes": ({"data.source": "stdlib"}, "have no part in data.source=stdlib"),
    "a mixture of nothing": ({"data.sources": None}, "gives data.source=mixture nothing to mix"),
    "a source without a path": ({"data.sources.text.source": "files"}, "path=null gives source=files nothing to read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_one_line(what: str, tmp_path: Path):
    changes, said = WRONG[what]
    with pytest.raises(RecipeError) as error:
        read(tmp_path, with_changes(**changes))
    line = str(error.value)
    assert said in line and "\n" not in line and "; " in line, line
