"""``train.micro_batch: auto``: what trials find, and that a run goes on as if the number had stood in its recipe."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.micro_batch import KEPT_FREE
from jobs.recipe import Recipe
from tests.jobs.test_resume import tensors_of
from tests.jobs.workers import run_all, run_together, small_recipe

STEPS, HALF, NEVER = 4, 2, 10**9
# Rows of a worker 8: 1, 2, 4 or 8.
PLACES = {
    "1 worker, ZeRO 0": {"cluster.workers": 1, "cluster.expert_parallel": 1, "train.zero_stage": 0},
    "2 workers, ZeRO 2": {"cluster.workers": 2, "cluster.expert_parallel": 1, "train.zero_stage": 2},
    "2 workers, ZeRO 3, experts split": {"cluster.workers": 2, "cluster.expert_parallel": 2, "train.zero_stage": 3},
}


def recipe_of(run_dir: Path, where: str, **keys: Any) -> Recipe:
    workers = PLACES[where]["cluster.workers"]
    fixed = {"train.steps": STEPS, "train.checkpoint_every": HALF, "train.global_batch": 8 * workers}
    fixed |= {"train.warmup_steps": 1, "model.router_bias_update_rate": 0.01, "model.embedding_dropout": 0.1}
    return small_recipe(run_dir, **PLACES[where] | fixed | {"train.micro_batch": "auto"} | keys)


def try_out(rank: int, recipe: Recipe, prepared: Path | None, sizes: list[int]) -> tuple[dict[int, int], int, int]:
    """What steps of these sizes take; the bytes that the trials hold when they are over; those of a model."""
    from jobs.micro_batch_trials import Trials, bytes_of
    from jobs.objectives.objective import Place
    from jobs.objectives.registry import open_objective

    def add_up(value):
        torch.distributed.all_reduce(value)
        return value

    objective = open_objective(recipe, prepared)
    model = objective.build_model()
    place = Place(rank, recipe.cluster.workers, torch.device("cpu"), add_up)
    before = bytes_alive()
    trials = Trials(recipe, objective, model, place)
    taken = {rows: trials.usage(rows).peak for rows in sizes}
    trials.close()
    del trials
    return taken, bytes_alive() - before, bytes_of(model)


def bytes_alive() -> int:
    """Of all tensors in this process, each storage once."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture(scope="module")
def taken(prepared, tmp_path_factory) -> dict[str, tuple[dict[int, int], int, int]]:
    """By place, what ``try_out`` finds."""
    folder = tmp_path_factory.mktemp("taken")
    return {
        where: run_together(keys["cluster.workers"], try_out, recipe_of(folder, where), prepared, [1, 2, 4, 8])[0]
        for where, keys in PLACES.items()
    }


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.timeout(900)
def test_more_rows_take_more_and_all_is_given_back(where, taken):
    peaks, left, weights = taken[where]
    assert peaks[1] < peaks[2] < peaks[4] < peaks[8]
    assert left < weights / 8


@pytest.fixture(scope="module")
def runs(prepared, taken, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """By place: where 4 rows fit and 8 do not, a whole run, one that stopped, the rest of it, and one as written."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for where in PLACES:
        peaks, place = taken[where][0], folder / where
        # Nearer to 8: what disturbs a measurement takes more, not less.
        limit = (peaks[4] + 3 * peaks[8]) / 4 / (1 - KEPT_FREE) / 2**30
        # The rest has to go on with 4 rows, though there is now room for all 8, and then for 2 alone.
        less = (peaks[2] + peaks[4]) / 2 / (1 - KEPT_FREE) / 2**30
        auto = recipe_of(folder, where, **{"cluster.memory_per_worker": limit})
        jobs = {
            "whole": (auto, place / "whole", NEVER),
            "written": (recipe_of(folder, where, **{"train.micro_batch": 4}), place / "written", NEVER),
            "first": (auto, place / "roomy", HALF),
            "roomy": (recipe_of(folder, where), place / "roomy", NEVER),
            "begun": (auto, place / "narrow", HALF),
            "narrow": (recipe_of(folder, where, **{"cluster.memory_per_worker": less}), place / "narrow", NEVER),
        }
        found[where] = {"folder": place} | dict(zip(jobs, run_all([*jobs.values()], prepared), strict=True))
    return found


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.timeout(900)
def test_what_fits_is_found_and_leaves_no_trace(where, runs):
    own = runs[where]
    rows, notes, settled = own["whole"]
    assert settled == {"train.micro_batch": 4}
    (note,) = [note for note in notes if "micro_batch" in note]
    assert re.match(r"train.micro_batch=4: a step takes .* of a worker's .*; 8 rows would take", note)
    assert curve(rows) == curve(own["written"][0]) and len(rows) == STEPS
    name = f"step-{STEPS:08d}"
    found, expected = (tensors_of(own["folder"] / run / "checkpoints" / name) for run in ("whole", "written"))
    assert found.keys() == expected.keys() and len(expected) > 20
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    weights = [load_file(own["folder"] / run / "checkpoints" / name / "model/model.safetensors")
               for run in ("whole", "written")]  # fmt: skip
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_what_it_began_with(where, runs):
    own = runs[where]
    for name, said in (("roomy", "train.micro_batch=4 as in the checkpoint: a step takes"),
                       ("narrow", "train.micro_batch=4 as in the checkpoint, but 4 rows would take")):  # fmt: skip
        rows, notes, settled = own[name]
        assert settled == {"train.micro_batch": 4}
        assert any(note.startswith(said) for note in notes), notes
        assert curve(rows) == curve(own["whole"][0])[HALF:]


def curve(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(row["loss"], row["gradient_norm"]) for row in rows]


TASKS = "{family: chain_sum, size: 20, held_out: 5}"
SOURCES = f"{{text: {{source: stdlib, limit_documents: 40}}, sums: {{source: tasks, tasks: {TASKS}}}}}"
SHORT = "{name: short, steps: 2, sequence_length: 64, mixture: {text: 1}}"
LONG = (
    "{name: long, steps: 2, sequence_length: 192, mixture: {text: 1, sums: 1}, loss_weights: {calibration: [0, 0.1]}}"
)
PAIRS = {
    "data.source": "tasks",
    "tasks.family": "spell_backward",
    "tasks.size": 5,
    "tasks.held_out": 3,
    "train.objective": "reward",
}


@pytest.mark.timeout(600)
def test_trials_see_every_stage_and_pairs(tmp_path):
    """The longest stage decides, with the loss that it weighs in the end."""
    (tmp_path / "logs").mkdir()
    mixed = {"data.source": "mixture", "data.sources": SOURCES, "data.limit_documents": "null", "train.steps": "null"}
    plans = {"short": [SHORT], "both": [SHORT, LONG], "unweighed": [SHORT, LONG.partition(", loss_weights")[0] + "}"]}
    recipes = {
        name: recipe_of(tmp_path, "1 worker, ZeRO 0", **mixed, **{"train.stages": f"[{', '.join(stages)}]"})
        for name, stages in plans.items()
    }
    recipes["pairs"] = recipe_of(
        tmp_path, "1 worker, ZeRO 0", **PAIRS, **{"data.limit_documents": "null", "train.sequence_length": 400}
    )
    peaks = run_together(1, try_out_all, recipes)[0]
    assert peaks["both"] > peaks["unweighed"] > 2 * peaks["short"] > 0
    assert peaks["pairs"] > peaks["unweighed"]  # two completions of 400 tokens to a row


def try_out_all(rank: int, recipes: dict[str, Recipe]) -> dict[str, int]:
    """What a step of 4 rows takes, by recipe."""
    return {name: try_out(rank, recipe, None, [4])[0][4] for name, recipe in recipes.items()}
