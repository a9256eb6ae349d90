"""One curve: a bare PyTorch loop, ZeRO 0 to 3, one and two workers, expert parallelism 1 and 2.

In fp32 two workers add up half-batch sums where one adds them in a row, so losses differ in the last bits (about 1e-7
of the value per step). Where a token's second and third expert are that close, rounding flips the choice, and with it
the loss by some 1e-5. Both kinds are told apart: with every expert chosen there is nothing to flip, and 20 steps must
agree to 1e-5; with two of four chosen, to 1e-3.
"""

from pathlib import Path
from typing import Any

import pytest

from jobs.recipe import Recipe
from tests.jobs.workers import bare_curve, curves, run_together, small_recipe

STEPS = 20
TOPOLOGIES = {  # name: (workers, keys)
    "1 worker, ZeRO 0": (1, {"train.zero_stage": 0}),
    "1 worker, ZeRO 1": (1, {"train.zero_stage": 1}),
    "1 worker, ZeRO 2": (1, {"train.zero_stage": 2}),
    "1 worker, ZeRO 3": (1, {"train.zero_stage": 3}),
    "2 workers, ZeRO 0": (2, {"train.zero_stage": 0}),
    "2 workers, ZeRO 1": (2, {"train.zero_stage": 1}),
    "2 workers, ZeRO 2": (2, {"train.zero_stage": 2}),
    "2 workers, ZeRO 3": (2, {"train.zero_stage": 3}),
    "2 workers, ZeRO 1, experts over 2": (2, {"train.zero_stage": 1, "cluster.expert_parallel": 2}),
    "2 workers, ZeRO 2, experts over 2": (2, {"train.zero_stage": 2, "cluster.expert_parallel": 2}),
    "2 workers, ZeRO 3, experts over 2": (2, {"train.zero_stage": 3, "cluster.expert_parallel": 2}),
}
TOP_K = {"every expert chosen": (4, 1e-5, 1e-3), "two of four chosen": (2, 1e-3, 5e-2)}


def recipe_of(run_dir: Path, workers: int, top_k: int, keys: dict[str, Any]) -> Recipe:
    expert_parallel = keys.get("cluster.expert_parallel", 1)
    fixed = {"cluster.workers": workers, "model.num_experts_per_tok": top_k, "cluster.expert_parallel": expert_parallel}
    return small_recipe(run_dir, **fixed, **{k: v for k, v in keys.items() if k != "cluster.expert_parallel"})


@pytest.fixture(scope="module")
def bare(prepared, tmp_path_factory) -> dict[int, list[tuple[float, float]]]:
    """The bare loop's curve, by number of chosen experts."""
    folder = tmp_path_factory.mktemp("bare")
    return {k: bare_curve(recipe_of(folder, 1, k, {}), prepared, STEPS)[0] for k, _, _ in TOP_K.values()}


@pytest.fixture(scope="module")
def stack(prepared, tmp_path_factory) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """The whole stack's curves, by topology and number of chosen experts."""
    found = {}
    for world in (1, 2):
        for top_k, _, _ in TOP_K.values():
            folder = tmp_path_factory.mktemp("stack")
            recipes = {n: recipe_of(folder, w, top_k, keys) for n, (w, keys) in TOPOLOGIES.items() if w == world}
            for name, (curve, _) in run_together(world, curves, recipes, prepared, folder, STEPS)[0].items():
                found[name, top_k] = curve
    return found


@pytest.mark.parametrize("choice", sorted(TOP_K))
@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
@pytest.mark.timeout(600)
def test_follows_the_bare_loop(bare, stack, name, choice):
    top_k, loss_tolerance, norm_tolerance = TOP_K[choice]
    for step, (ours, plain) in enumerate(zip(stack[name, top_k], bare[top_k], strict=True)):
        assert ours[0] == pytest.approx(plain[0], rel=loss_tolerance), f"loss of step {step}"
        assert ours[1] == pytest.approx(plain[1], rel=norm_tolerance), f"gradient norm of step {step}"


def test_the_curve_falls(bare):
    """Equal curves would prove little if nothing were learned."""
    for curve in bare.values():
        assert curve[-1][0] < curve[0][0] - 1.0


def test_accumulation_changes_nothing_but_rounding(prepared, tmp_path):
    """With the balance loss taken per sequence: the batch's load is not known before its last micro batch."""
    keys = {"train.zero_stage": 2, "cluster.expert_parallel": 2, "model.router_balance_scope": "sequence"}
    recipes = {f"micro {micro}": recipe_of(tmp_path, 2, 4, keys | {"train.micro_batch": micro}) for micro in (1, 2, 4)}
    found = run_together(2, curves, recipes, prepared, tmp_path, STEPS)[0]
    for micro in (1, 2):
        for ours, whole in zip(found[f"micro {micro}"][0], found["micro 4"][0], strict=True):
            assert ours[0] == pytest.approx(whole[0], rel=1e-5)


VARIANTS = {  # name: (keys, relative tolerance of the loss)
    "offload, ZeRO 2": ({"train.zero_stage": 2, "train.offload_optimizer": True}, 1e-5),
    "checkpointing, ZeRO 3, experts over 2": (
        {"train.zero_stage": 3, "cluster.expert_parallel": 2, "train.gradient_checkpointing": True},
        1e-5,
    ),
    # 8 bits of mantissa in weights and activations: 2^-8 of the value is what may differ.
    "bf16, ZeRO 1": ({"train.zero_stage": 1, "train.precision": "bf16"}, 2**-8),
    "bf16, ZeRO 2, experts over 2": (
        {"train.zero_stage": 2, "cluster.expert_parallel": 2, "train.precision": "bf16"},
        2**-8,
    ),
    "bf16, ZeRO 3, experts over 2": (
        {"train.zero_stage": 3, "cluster.expert_parallel": 2, "train.precision": "bf16"},
        2**-8,
    ),
}


@pytest.fixture(scope="module")
def variants(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    recipes = {name: recipe_of(folder, 2, 4, keys) for name, (keys, _) in VARIANTS.items()}
    return run_together(2, curves, recipes, prepared, folder, STEPS)[0]


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_offload_checkpointing_and_bf16_follow_the_bare_loop(bare, variants, name):
    for step, (ours, plain) in enumerate(zip(variants[name][0], bare[4], strict=True)):
        assert ours[0] == pytest.approx(plain[0], rel=VARIANTS[name][1]), f"loss of step {step}"
