"""A run of three stages is itself when it stops and goes on: in the middle of a stage, and exactly at its edges."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from jobs.recipe import Recipe, load_recipe
from mmada.training.schedules import warmup_cosine
from tests.jobs.test_recipe_stages import with_changes
from tests.jobs.test_resume import tensors_of
from tests.jobs.workers import run_all, small_recipe

EDGES = (4, 10, 14)
STAGES = [
    {"name": "core", "steps": 4, "mixture": {"text": 1.0}, "frozen": ["embeddings"]},
    {
        "name": "sums",
        "steps": 6,
        "sequence_length": 96,
        "mixture": {"text": 1.0, "sums": 1.0},
        "pacing": {"kind": "linear", "start": 0.2},
        "learning_rate_factor": 0.5,
        "warmup_steps": 2,
    },
    {
        "name": "both",
        "steps": 4,
        "global_batch": 16,
        "frozen": ["norms", "model.layers.0.*"],
        "pacing": {"kind": "gated", "start": 0.5, "metric": "held_out_bits", "threshold": 100.0},
    },
]


def staged(folder: Path, name: str, workers: int, zero_stage: int, **train: Any) -> Recipe:
    changes = {"train.stages": STAGES, "train.sequence_length": 128, "train.evaluate_every": 2, "run.name": name}
    changes |= {"run.dir": str(folder), "train.zero_stage": zero_stage, "train.checkpoint_every": 1}
    changes |= {"train.keep_checkpoints": 20, "train.evaluate_rows": 4, "train.learning_rate": 1e-2}
    changes |= {"cluster": {"workers": workers, "threads_per_worker": 1}}
    changes |= {f"train.{key}": value for key, value in train.items()}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(with_changes(**changes)))
    return load_recipe(path)


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=["one worker", "two workers"])
def runs(request, tmp_path_factory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The whole run, and runs that go on from its checkpoints: their folder, and the metrics of their steps by name."""
    workers, zero_stage = request.param
    folder = tmp_path_factory.mktemp("runs")
    whole = staged(folder, "whole", workers, zero_stage)
    ((rows, _, _),) = run_all([(whole, folder / "whole", 99)], folder)
    found = {"whole": rows}
    jobs = []
    for stop in (EDGES[0], 7, EDGES[1]):
        name = f"from-{stop}"
        kept = folder / name / "checkpoints" / f"step-{stop:08d}"
        shutil.copytree(folder / "whole" / "checkpoints" / kept.name, kept)
        jobs.append((staged(folder, name, workers, zero_stage), folder / name, 99))
    for (recipe, _, _), (rows, _, _) in zip(jobs, run_all(jobs, folder), strict=True):
        found[recipe.run.name] = rows
    return folder, found


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("step_seconds", "checkpoint")} for row in rows]


def test_what_goes_on_is_the_whole_to_the_bit(runs):
    folder, found = runs
    assert [row["step"] for row in found["whole"]] == list(range(1, EDGES[-1] + 1))
    last = f"checkpoints/step-{EDGES[-1]:08d}"
    expected = tensors_of(folder / "whole" / last)
    for name in found.keys() - {"whole"}:
        assert without_times(found[name]) == without_times(found["whole"])[int(name.removeprefix("from-")) :], name
        tensors = tensors_of(folder / name / last)
        assert [key for key in expected if not torch.equal(expected[key], tensors[key])] == [], name


def test_stages_are_what_they_say(runs):
    folder, found = runs
    rows = found["whole"]
    assert [row["stage"] for row in rows] == [1] * 4 + [2] * 6 + [3] * 4
    assert [round(row["competence"], 3) for row in rows[4:10]] == [0.2, 0.333, 0.467, 0.6, 0.733, 0.867]
    # A gate that every evaluation passes opens by a quarter each time; the one at the end counts for nothing more.
    assert [row["competence"] for row in rows[10:]] == [0.5, 0.5, 0.75, 0.75]
    parts = [1.0] * 4 + [0.5 * 0.5, 0.5, 0.5, 0.5, 0.5, 0.5] + [1.0] * 4  # half, with two steps of warm-up
    cosine = [warmup_cosine(step, peak=1e-2, steps=14, warmup_steps=0, min_ratio=0.1) for step in range(14)]
    assert [row["learning_rate"] for row in rows] == pytest.approx([a * b for a, b in zip(cosine, parts, strict=True)])


def test_what_is_frozen_stays_and_what_is_not_moves(runs):
    folder, _ = runs

    def weights(step: int) -> dict[str, torch.Tensor]:
        return load_file(folder / "whole" / "checkpoints" / f"step-{step:08d}" / "model" / "model.safetensors")

    for before, after, frozen in ((1, 4, "embed_tokens"), (10, 14, "norm")):
        old, new = weights(before), weights(after)
        for name in old:
            stays = frozen in name or (frozen == "norm" and name.startswith("model.layers.0."))
            assert torch.equal(old[name], new[name]) == stays, (name, before, after)


def test_a_run_without_stages_takes_more_steps_and_checkpoints_that_know_none(prepared, tmp_path: Path):
    """Of what a run has read, its step alone tells."""
    from jobs.objectives.registry import open_objective
    from jobs.stage_runner import StageRunner
    from mmada.data import global_batch_indices

    recipe = small_recipe(tmp_path, **{"train.steps": 50, "train.global_batch": 8})
    objective = open_objective(recipe, prepared)
    ended = StageRunner(recipe, objective)
    for _ in range(50):
        ended.draw()
        ended.stepped(1.0)
    assert ended.is_done
    longer = small_recipe(tmp_path, **{"train.steps": 90, "train.global_batch": 8})
    for saved in (ended.to_json(), None):
        again = StageRunner(longer, objective)
        again.restore(saved, 50)
        assert not again.is_done and again.state.step_in_stage == 50
        rows = again.draw().draw.rows_B.tolist()
        assert rows == global_batch_indices(0, 50, 8, len(objective.rows)).tolist()
