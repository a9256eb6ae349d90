"""Terms beside the objective in whole runs: each does what it is for, and without a weight none of it is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.recipe import Recipe
from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM
from tests.jobs.workers import run_together, small_recipe

pytestmark = pytest.mark.timeout(600)  # two dozen runs

STEPS, FEW = 12, 3
GATED = {"num_experts": 0, "mlp_layer_types": "null", "mixer_types": "hybrid", "hybrid.fusion": "routed"}
MODEL = {f"model.{name}": value for name, value in GATED.items()} | {"cluster.expert_parallel": 1}
TRAIN = {"train.steps": 100, "train.warmup_steps": 1, "train.learning_rate": 1e-2, "train.sequence_length": 64}
ONE = {"cluster.workers": 1, "train.zero_stage": 0}
TWO = {"cluster.workers": 2, "train.zero_stage": 2}
CALIBRATIONS = ("soft_bins", "mmce", "brier")
TINY = 1e-12  # measured, without a say
LIMIT, RATE, PRICE = 0.02, 3.0, 0.25


def of_calibration(kind: str, weight: float, language_model: float = 1.0) -> dict[str, Any]:
    weights = {"objectives.weights": f"{{calibration: {weight}, language_model: {language_model}}}"}
    # A model that is sure of itself before it has learned anything.
    return weights | {"objectives.calibration": kind, "model.initializer_range": 0.3}


def of(name: str, weight: float, **more: Any) -> dict[str, Any]:
    return {"objectives.weights": f"{{{name}: {weight}}}"} | {f"objectives.{key}": value for key, value in more.items()}


NOWHERE = "/nowhere/at/all"
ALL_ZERO = "{calibration: 0.0, compute: 0.0, safety: 0.0}"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    # There is no such model: a reference that was loaded all the same would end the run.
    "zero": {"objectives.weights": ALL_ZERO, "objectives.safety_reference": NOWHERE, "objectives.time_target": 0.0}
    | {"objectives.compute_cost": "seconds"},
    **{f"{kind}, watched": of_calibration(kind, TINY) for kind in ("soft_bins", "mmce")},
    **{kind: of_calibration(kind, 3.0) for kind in ("soft_bins", "mmce")},
    "brier": of_calibration("brier", 1.0, language_model=0.0),
    "compute, watched": of("compute", TINY),
    "compute": of("compute", 30.0, compute_target=0.5),
    "seconds": of("compute", 1.0, compute_cost="seconds", time_target=0.0),
    "safety, watched": of("safety", TINY),
    "safety": of("safety", 3.0),
    "limit": of("safety", 1.0, safety_limit=LIMIT, safety_rate=RATE),
    "within": of("safety", 1.0, safety_limit=100.0, safety_rate=0.001),
}
SHARED = (*CALIBRATIONS, "compute", "seconds", "safety", "limit")  # also by two workers, a few steps
SPLIT = ("compute", "safety")  # and where no worker has a weight whole


def recipe_for(folder: Path, kind: str, topology: dict[str, Any]) -> Recipe:
    keys = {**MODEL, **TRAIN, **topology, **KINDS[kind]}
    if kind.startswith(("safety", "limit", "within")):
        keys["objectives.safety_reference"] = str(folder / "reference")
    return small_recipe(folder, **keys)


def steps_of(rank: int, recipes: dict[str, Recipe], prepared: Path, num_steps: int) -> dict[str, dict[str, Any]]:
    """By recipe: the metrics of some steps, the weights after them, and what is kept of the terms."""
    from jobs.worker import TrainingWorker

    found = {}
    for kind, recipe in recipes.items():
        run_dir = recipe.run_dir / f"{kind} {recipe.cluster.workers}".replace(" ", "-").replace(",", "")
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        worker = TrainingWorker(recipe, run_dir, prepared, torch.device("cpu"), lambda message: None)
        if kind == "within":
            worker.stages.weights.multipliers["safety"] = PRICE
        rows = [worker.train_step(step) for step in range(num_steps)]
        weights = {name: tensor.detach().numpy().copy() for name, tensor in worker.model.named_parameters()}
        found[kind] = {"rows": rows, "weights": weights, "kept": worker.stages.weights.kept}
        if kind == "seconds":
            found["seconds, gone on"] = {"kept": gone_on(recipe, run_dir, prepared, worker.stages.to_json(), num_steps)}
    return found


def gone_on(recipe: Recipe, run_dir: Path, prepared: Path, saved: dict[str, Any], done: int) -> Any:
    """What a worker keeps of its terms that takes a run's next step from what its checkpoint says."""
    from jobs.worker import TrainingWorker

    worker = TrainingWorker(recipe, run_dir, prepared, torch.device("cpu"), lambda message: None)
    worker.stages.restore(json.loads(json.dumps(saved)), done)
    worker.train_step(done)
    return worker.stages.weights.kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where runs go, with the model that is trusted: one that begins elsewhere."""
    from jobs.model_building import build_model

    folder = tmp_path_factory.mktemp("runs")
    build_model(small_recipe(folder, **{**MODEL, **TRAIN, **ONE, "run.seed": 7})).save_pretrained(folder / "reference")
    return folder


@pytest.fixture(scope="module")
def one(prepared, folder) -> dict[str, dict[str, Any]]:
    recipes = {kind: recipe_for(folder, kind, ONE) for kind in KINDS}
    return run_together(1, steps_of, recipes, prepared, STEPS)[0]


@pytest.fixture(scope="module")
def two(prepared, folder) -> list[dict[str, dict[str, Any]]]:
    recipes = {kind: recipe_for(folder, kind, TWO) for kind in SHARED}
    recipes |= {f"{kind}, ZeRO 3": recipe_for(folder, kind, TWO | {"train.zero_stage": 3}) for kind in SPLIT}
    return run_together(2, steps_of, recipes, prepared, FEW)


def test_without_weight_a_run_is_itself_to_the_bit_and_nothing_is_loaded_watched_or_measured(one):
    plain, zero = one["plain"], one["zero"]
    assert zero["rows"] == plain["rows"] and zero["kept"] == {}
    assert not any(name.startswith(("loss.", "weight.", "expected", "forward")) for name in zero["rows"][0])
    for name, weight in plain["weights"].items():
        assert (weight == zero["weights"][name]).all(), name


@pytest.mark.parametrize("kind", ["soft_bins", "mmce"])
def test_calibration_falls_where_it_has_weight(kind, one):
    ours, watched = (one[name]["rows"] for name in (kind, f"{kind}, watched"))
    assert ours[0]["loss.calibration"] == watched[0]["loss.calibration"]  # the same model at first
    late = [sum(row["loss.calibration"] for row in rows[-4:]) for rows in (ours, watched)]
    assert late[0] < 0.8 * late[1]
    for row in ours:
        assert row["weight.calibration"] == 3.0 and row["weight.language_model"] == 1.0
        assert 0 < row["calibration_error"] < 1 and 0 <= row["training_accuracy"] <= 1
        assert row["loss.language_model"] == pytest.approx(row["loss"])


def test_the_brier_score_teaches_by_itself(one):
    """Beside the language model's loss it would say little: both are least where the probabilities are right."""
    rows = one["brier"]["rows"]
    assert rows[-1]["loss.calibration"] < 0.93 * rows[0]["loss.calibration"]
    assert rows[0]["weight.calibration"] == 1.0 and "weight.language_model" not in rows[0]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5  # reported, though nothing learns from it


def test_operations_fall_where_they_have_a_price(one):
    ours, watched = (one[name]["rows"] for name in ("compute", "compute, watched"))
    assert ours[0]["expected_operations"] == watched[0]["expected_operations"]
    assert ours[-1]["expected_operations"] < watched[-1]["expected_operations"] - 0.02
    for row in ours:
        assert row["loss.compute"] == pytest.approx(max(0.0, row["expected_operations"] - 0.5) ** 2, rel=1e-5)
        assert "forward_seconds" not in row and "expected_seconds" not in row


def test_time_is_measured_once_and_kept_and_its_own_term_is_reported(one, two):
    first, rows = one["seconds"], one["seconds"]["rows"]
    costs = first["kept"]["compute"]
    assert sorted(costs) == ["model.layers.0.mixer", "model.layers.1.mixer"]
    assert all(0 < seconds < 0.1 for both in costs.values() for seconds in both)
    assert one["seconds, gone on"]["kept"] == first["kept"]  # measured anew they would be others
    ranks = [each["seconds"]["kept"]["compute"] for each in two]
    assert ranks[0] == ranks[1] and ranks[0] != costs
    for row in rows:
        assert (
            0 < row["forward_seconds"] < 60 and 0 < row["expected_seconds"] <= 1 and 0 < row["expected_operations"] <= 1
        )
        assert row["time_hinge"] == pytest.approx(row["forward_seconds"] ** 2, rel=1e-5)  # the target is 0
        assert row["loss.compute"] == pytest.approx(row["expected_seconds"] ** 2, rel=1e-5)


def test_a_model_stays_near_the_one_that_is_trusted(one):
    ours, watched = (one[name]["rows"] for name in ("safety", "safety, watched"))
    assert ours[0]["reference_divergence"] == watched[0]["reference_divergence"] > 0
    assert ours[-1]["reference_divergence"] < 0.7 * watched[-1]["reference_divergence"]
    for rows, name in ((ours, "safety"), (watched, "safety, watched")):
        assert all(row["loss.safety"] == pytest.approx(row["reference_divergence"]) for row in rows)
        after = sum((weight.astype("float64") ** 2).sum() for weight in one[name]["weights"].values())
        assert rows[-1]["squared_weights"] == pytest.approx(after, rel=0.1) and after != rows[-1]["squared_weights"]


def test_the_price_rises_above_the_limit_and_falls_to_nothing_below_it(one):
    rows = one["limit"]["rows"]
    prices = [row["weight.safety"] for row in rows]
    assert prices[0] == 0.0 and prices == sorted(prices) and prices[-1] > 1
    for before, after in zip(rows[:-1], rows[1:], strict=True):
        grown = max(0.0, before["weight.safety"] + RATE * (before["loss.safety"] - LIMIT))
        assert before["loss.safety"] > LIMIT and after["weight.safety"] == pytest.approx(grown, rel=1e-9)
    assert rows[-1]["loss.safety"] < one["safety, watched"]["rows"][-1]["loss.safety"]
    prices = [row["weight.safety"] for row in one["within"]["rows"]]
    assert prices[:3] == pytest.approx([0.25, 0.15, 0.05], abs=0.01) and prices[3:] == [0.0] * (STEPS - 3)
    assert all(row["loss.safety"] > 0 for row in one["within"]["rows"])  # measured on, should it rise again


@pytest.mark.parametrize("kind", SHARED)
def test_two_workers_do_what_one_does(kind, one, two):
    kept = ("loss", "gradient_norm", "weight.", "calibration_error", "expected_operations", "squared_weights")
    for step in range(1 if kind == "seconds" else FEW):  # whose costs are not the other run's
        ours, theirs = (
            {name: value for name, value in found[kind]["rows"][step].items() if name.startswith(kept)}
            for found in (two[0], one)
        )
        if kind == "seconds":
            ours, theirs = ({"loss": row["loss"], "operations": row["expected_operations"]} for row in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6), step


@pytest.mark.parametrize("kind", SPLIT)
def test_weights_that_are_split_over_the_workers_change_nothing(kind, one, two):
    for ours, theirs in zip(two[0][f"{kind}, ZeRO 3"]["rows"], one[kind]["rows"], strict=False):
        named = {name for name in theirs if name.startswith(("loss", "gradient_norm", "expected", "reference"))}
        assert f"loss.{kind}" in named and "squared_weights" not in ours
        assert {name: ours[name] for name in named} == pytest.approx({name: theirs[name] for name in named}, rel=2e-4)


def test_operations_are_those_of_the_models_own_sides_and_nothing_is_drawn():
    import copy

    from torch.utils.flop_counter import FlopCounterMode

    from jobs.objectives.terms.operations import counted_costs, measured_costs
    from mmada.nn.context import Context
    from mmada.nn.positions import rotary_cos_sin
    from mmada.presets import build_config

    config: MMaDAConfig = build_config(
        "debug", num_experts=0, mlp_layer_types=None, mixer_types="hybrid", hybrid={"fusion": "routed"}
    )
    model = MMaDAForCausalLM(config)
    before = torch.get_rng_state()
    costs = counted_costs(model)
    assert measured_costs(model, 16).keys() == costs.keys() == {f"model.layers.{i}.mixer" for i in range(2)}
    assert torch.equal(torch.get_rng_state(), before)
    hidden, positions = torch.randn(1, 64, config.hidden_size), torch.arange(64)[None]
    context = Context(shape=(1, 64), device=hidden.device, position_ids_BT=positions)
    context.rotary = rotary_cos_sin(config, positions, hidden.dtype)
    for name, cost in costs.items():
        layer = model.get_submodule(name)
        for side, counted in ((layer.recurrent, cost.open), (layer.attention, cost.shut)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                copy.deepcopy(side).eval()(hidden, context)
            assert counted == counter.get_total_flops() / 64
    heads, each, width = config.num_attention_heads, config.head_dim, config.hidden_size
    projections = 2 * width * each * (2 * heads + 2 * config.num_key_value_heads)
    assert projections <= costs["model.layers.0.mixer"].shut <= projections + 4 * 64 * heads * each
    assert model.get_submodule("model.layers.0.mixer").attention is not None and costs["model.layers.0.mixer"].open > 0
