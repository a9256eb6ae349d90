"""Everything the backbone can do in one model, trained: one curve at every ZeRO stage, and resumed exactly."""

from pathlib import Path

import pytest
import torch

from jobs.bare_loop import text_batches
from jobs.recipe import Recipe, load_recipe
from mmada.config import MIXER_TYPES
from tests.jobs.workers import bare_curve, run_together

STEPS, HALF = 4, 2
# Tokens that take one branch of a layer or the other, updates that most tokens do not make, and segments of which one
# worker's rows have more than the other's.
SPARSE = [
    "model.hybrid.fusion=routed",
    "model.memory.gate=hard",
    "model.memory.surprise_threshold=0.3",
    "model.memory.segment_size=2",
]
# One expert for a token, and after the first step only those that had fewer tokens than their share.
IDLE = [
    "model.num_hidden_layers=2",
    "model.mixer_types=hybrid,memory_gate",
    "model.num_experts_per_tok=1",
    "model.cross_expert_attention=false",
    "model.router_bias_update_rate=10",
]
CASES = {  # name: (ZeRO stage, keys of the model)
    "ZeRO 1": (1, []),
    "ZeRO 2": (2, []),
    "ZeRO 3": (3, []),
    "ZeRO 3, parts that a batch may not touch": (3, SPARSE),
    "ZeRO 2, experts that no token chooses": (2, IDLE),
    "ZeRO 3, experts that no token chooses": (3, IDLE),
}
# Small enough for a test; with every expert chosen rounding has no choice to flip.
SMALL = [
    "train.steps=4",
    "train.warmup_steps=1",
    "train.global_batch=4",
    "train.sequence_length=48",
    "train.evaluate_every=0",
    "model.num_experts_per_tok=4",
    "cluster.threads_per_worker=1",
]


def recipe_of(run_dir: Path, *keys: str) -> Recipe:
    return load_recipe("backbone-all", [*SMALL, f"run.dir={run_dir}", *keys])


@pytest.fixture(scope="module")
def bare(prepared, tmp_path_factory) -> dict[tuple[str, ...], list[tuple[float, float]]]:
    """Loss and gradient norm of every step in one process, by the keys of the model."""
    folder = tmp_path_factory.mktemp("bare")
    return {tuple(keys): bare_curve(recipe_of(folder, *keys), prepared, STEPS)[0] for keys in ([], SPARSE, IDLE)}


def straight_and_resumed(rank: int, folder: Path, prepared: Path) -> dict[str, tuple]:
    """By case: the uninterrupted curve, and what steps from HALF on give after a resume from that checkpoint."""
    import torch.distributed as dist

    from jobs.worker import TrainingWorker

    class Stop(Exception):
        pass

    found = {}
    for name, (stage, keys) in CASES.items():
        run_dir, curves = folder / name.replace(" ", "-"), []
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        recipe = recipe_of(run_dir, f"train.zero_stage={stage}", *keys)
        for _ in range(2):
            worker = TrainingWorker(recipe, run_dir, prepared, torch.device("cpu"), lambda message: None)
            steps = range(worker.start, STEPS)
            curves.append([])
            for step in steps:
                metrics = worker.train_step(step)
                curves[-1].append((metrics["loss"], metrics["gradient_norm"]))
                if step + 1 == HALF and len(curves) == 1:
                    worker.save(HALF)
                    dist.barrier()
        found[name] = tuple(curves)
    return found


@pytest.fixture(scope="module")
def stack(prepared, tmp_path_factory):
    return run_together(2, straight_and_resumed, tmp_path_factory.mktemp("stack"), prepared)[0]


def test_the_recipe_holds_every_kind_of_mixer():
    assert set(load_recipe("backbone-all").model.overrides()["mixer_types"].split(",")) == set(MIXER_TYPES)


def test_the_second_step_leaves_experts_idle_where_it_should(prepared, tmp_path):
    recipe = recipe_of(tmp_path, *IDLE)
    model = bare_curve(recipe, prepared, 1)[1]
    assert (model.train()(**text_batches(recipe, prepared)(1)).expert_load == 0).any(dim=1).all()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_two_workers_follow_one_process(bare, stack, case):
    for step, (ours, plain) in enumerate(zip(stack[case][0], bare[tuple(CASES[case][1])], strict=True)):
        assert ours[0] == pytest.approx(plain[0], rel=1e-5), f"loss of step {step}"
        assert ours[1] == pytest.approx(plain[1], rel=1e-3), f"gradient norm of step {step}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_same_bit_for_bit(stack, case):
    straight, resumed = stack[case]
    assert len(resumed) == STEPS - HALF
    assert resumed == straight[HALF:]
