"""What stands beside the expert block follows the bare loop when DeepSpeed puts its own layer in the block's place.

Every expert is chosen, so that rounding cannot flip a choice; see ``test_parity``.
"""

from pathlib import Path
from typing import Any

import pytest

from jobs.recipe import Recipe
from tests.jobs.workers import bare_curve, curves, run_together, small_recipe

STEPS = 8
EVERYTHING = {
    "model.num_shared_experts": 1, "model.cross_expert_attention": True, "model.cross_expert_heads": 4,
    "model.router_normalizer": "sparsemax", "model.embedding_dropout": 0.1, "model.token_mask_probability": 0.1,
}  # fmt: skip
MODELS = {
    "everything": EVERYTHING,
    "cross-expert attention, softmax": {"model.cross_expert_attention": True},
    "sparsemax without the attention": {"model.router_normalizer": "sparsemax"},
}
ENGINES = {  # name: (model, keys); all with two workers that hold two experts each
    "everything, ZeRO 1": ("everything", {"train.zero_stage": 1}),
    "everything, ZeRO 2": ("everything", {"train.zero_stage": 2}),
    "everything, ZeRO 3": ("everything", {"train.zero_stage": 3}),
    "everything, ZeRO 3, checkpointing": (
        "everything",
        {"train.zero_stage": 3, "train.gradient_checkpointing": True},
    ),
    "softmax, ZeRO 3": ("cross-expert attention, softmax", {"train.zero_stage": 3}),
    "sparsemax, ZeRO 3": ("sparsemax without the attention", {"train.zero_stage": 3}),
}


def recipe_of(run_dir: Path, model: str, **keys: Any) -> Recipe:
    return small_recipe(run_dir, **{"model.num_experts_per_tok": 4, "train.zero_stage": 0} | MODELS[model] | keys)


@pytest.fixture(scope="module")
def bare(prepared, tmp_path_factory) -> dict[str, tuple[list[tuple[float, float]], dict[str, tuple[int, ...]]]]:
    folder, found = tmp_path_factory.mktemp("bare"), {}
    for model in MODELS:
        recipe = recipe_of(folder, model, **{"cluster.workers": 1, "cluster.expert_parallel": 1})
        curve, trained = bare_curve(recipe, prepared, STEPS)
        found[model] = curve, {name: tuple(p.shape) for name, p in trained.named_parameters()}
    return found


@pytest.fixture(scope="module")
def engines(prepared, tmp_path_factory) -> dict[str, Any]:
    folder, two = tmp_path_factory.mktemp("engines"), {"cluster.workers": 2, "cluster.expert_parallel": 2}
    recipes = {name: recipe_of(folder, model, **two, **keys) for name, (model, keys) in ENGINES.items()}
    return run_together(2, curves, recipes, prepared, folder, STEPS)[0]


@pytest.mark.parametrize("name", sorted(ENGINES))
@pytest.mark.timeout(600)
def test_follows_the_bare_loop(bare, engines, name):
    (steps, tensors), (plain_steps, plain_tensors) = engines[name], bare[ENGINES[name][0]]
    for step, (ours, plain) in enumerate(zip(steps, plain_steps, strict=True)):
        assert ours[0] == pytest.approx(plain[0], rel=1e-5), f"loss of step {step}"
        assert ours[1] == pytest.approx(plain[1], rel=1e-3), f"gradient norm of step {step}"
    assert tensors == plain_tensors


def test_the_curves_fall_and_differ(bare):
    last = [steps[-1][0] for steps, _ in bare.values()]
    assert all(steps[-1][0] < steps[0][0] - 0.5 for steps, _ in bare.values())
    assert min(abs(a - b) for i, a in enumerate(last) for b in last[:i]) > 1e-3
