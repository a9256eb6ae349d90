"""Learning from tasks and from pairs through the whole stack: one curve whatever the workers, resumed exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.parameter_groups import parameter_groups
from jobs.evaluate import here
from jobs.objectives.objective import Objective
from jobs.objectives.registry import OBJECTIVES, open_objective, prepare_objective
from jobs.recipe import Recipe, RecipeError, load_recipe
from jobs.recipe_checks import check
from mmada.data import global_batch_indices, load_tokenizer, sample_ids
from mmada.errors import DataError
from mmada.model import MMaDAForCausalLM
from mmada.reward_model import MMaDARewardModel
from mmada.training.schedules import warmup_cosine
from tests.jobs.workers import run_together

STEPS, HALF = 4, 2
COMMON = [
    "data.limit_documents=null",
    "data.source=tasks",
    "tasks.family=spell_backward",
    "tasks.size=24",
    "tasks.held_out=7",
    "train.sequence_length=96",
    "train.steps=4",
    "train.warmup_steps=1",
    "train.global_batch=4",
    "train.evaluate_every=0",
    "train.checkpoint_every=0",
    "model.num_experts_per_tok=4",  # every expert: rounding has no choice to flip
    "cluster.threads_per_worker=1",
]
REWARD = ["train.objective=reward"]
CASES: dict[str, tuple[list[str], list[str]]] = {  # name: (what is learned, where)
    "tasks, ZeRO 2": ([], ["train.zero_stage=2", "cluster.expert_parallel=1"]),
    "reward, ZeRO 1, in micro batches": (
        REWARD,
        [
            "train.zero_stage=1",
            "cluster.expert_parallel=1",
            "train.micro_batch=1",
            "model.router_balance_scope=sequence",
        ],
    ),
    "reward, ZeRO 2, experts over 2": (REWARD, ["train.zero_stage=2", "cluster.expert_parallel=2"]),
    "reward, ZeRO 3": (REWARD, ["train.zero_stage=3", "cluster.expert_parallel=1"]),
}
BEGUN = {
    "policy": ["cluster.expert_parallel=1"],
    "reward": [*REWARD, "train.zero_stage=3", "cluster.expert_parallel=1"],
}
SEQUENCE_SCOPE = "model.router_balance_scope=sequence"


def recipe_of(run_dir: Path, *keys: str) -> Recipe:
    return load_recipe("debug", [*COMMON, f"run.dir={run_dir}", "run.name=run", *keys])


class Plain:
    """A model in the place of an engine."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.module = self.forward = model


def bare(recipe: Recipe, steps: int) -> tuple[list[tuple[float, float]], torch.nn.Module, Objective]:
    """(loss, gradient norm) of every step in this process, without DeepSpeed; the model after them."""
    objective, train = prepare_objective(recipe), recipe.train
    model = objective.build_model().train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, train.weight_decay), betas=(train.beta1, train.beta2), eps=train.epsilon
    )
    curve = []
    for step in range(steps):
        batch = objective.rows.batch(
            global_batch_indices(recipe.run.seed, step, train.global_batch, len(objective.rows))
        )
        batch["sample_ids"] = torch.from_numpy(sample_ids(recipe.run.seed, step, train.global_batch))
        result = objective.forward(Plain(model), batch, objective.count(batch)[0])  # type: ignore[arg-type]
        result.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(
                step, peak=train.learning_rate, steps=train.steps, warmup_steps=1, min_ratio=0.1
            )
        optimizer.step()
        optimizer.zero_grad()
        if result.expert_load is not None:
            model.update_router_bias(result.expert_load)
        curve.append((float(result.metrics["loss"]), float(norm)))
    return curve, model.eval(), objective


def straight_and_resumed(rank: int, folder: Path) -> dict[str, Any]:
    """By case: the uninterrupted curve, that from HALF on after a resume, the last metrics, and notes."""
    import torch.distributed as dist

    from jobs.worker import TrainingWorker

    found: dict[str, Any] = {}
    for name, (what, where) in CASES.items():
        run_dir, curves = folder / name.replace(" ", "-"), []
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        recipe = recipe_of(run_dir, *what, *where)
        for _ in range(2):
            worker = TrainingWorker(recipe, run_dir, None, torch.device("cpu"), lambda message: None)
            curves.append([])
            for step in range(worker.start, STEPS):
                metrics = worker.train_step(step)
                curves[-1].append((metrics["loss"], metrics["gradient_norm"]))
                if step + 1 == HALF and len(curves) == 1:
                    worker.save(HALF)
                    dist.barrier()
        held_out = worker.evaluate(all_rows=True)
        worker._finish()
        folder_of_last = worker.save(STEPS)
        dist.barrier()
        found[name] = (*curves, held_out, metrics, folder_of_last)
    start_from = f"train.start_from={found['tasks, ZeRO 2'][4]}"
    found["begun"] = {name: begun(recipe_of(folder, start_from, *keys), folder / name) for name, keys in BEGUN.items()}
    return found


def begun(recipe: Recipe, run_dir: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """What a new worker notes, and the weights that it begins with."""
    from jobs.worker import TrainingWorker

    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    worker = TrainingWorker(recipe, run_dir, None, torch.device("cpu"), lambda message: None)
    return worker.progress._notes, {name: tensor.numpy() for name, tensor in worker.engine.named_full_tensors()}


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return run_together(2, straight_and_resumed, tmp_path_factory.mktemp("stack"))[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same in one process, by what is learned and how balance is taken."""
    folder, scopes = tmp_path_factory.mktemp("bare"), ([], [SEQUENCE_SCOPE])
    keys = {tuple([*what, *scope]): [*what, *scope] for what in ([], REWARD) for scope in scopes}
    return {name: bare(recipe_of(folder, *each), STEPS) for name, each in keys.items()}


def alone(plain, case: str):
    what, where = CASES[case]
    return plain[*what, SEQUENCE_SCOPE] if SEQUENCE_SCOPE in where else plain[tuple(what)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_two_workers_follow_one_process(stack, plain, case):
    for step, (ours, theirs) in enumerate(zip(stack[case][0], alone(plain, case)[0], strict=True)):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5), f"loss of step {step}"
        assert ours[1] == pytest.approx(theirs[1], rel=1e-3), f"gradient norm of step {step}"


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_same_bit_for_bit(stack, case):
    straight, resumed = stack[case][:2]
    assert len(resumed) == STEPS - HALF and resumed == straight[HALF:]


@pytest.mark.parametrize("case", CASES)
def test_evaluation_shared_out_is_that_of_one_process(stack, plain, case):
    _, model, objective = alone(plain, case)
    found = stack[case][2]
    engine = Plain(model)
    engine.settings = type("Settings", (), {"zero_stage": 3, "expert_parallel": 1})  # type: ignore[attr-defined]
    expected = objective.evaluate(engine, here(model), 5, None)  # type: ignore[arg-type]
    assert found.keys() - {"held_out_accuracy"} == expected.keys()
    assert ("held_out_accuracy" in found) == (case == "tasks, ZeRO 2")
    for name, value in expected.items():
        flip = 0.05 if name.startswith("pair") else 2e-3  # two rewards as good as equal may change places
        assert found[name] == pytest.approx(value, abs=flip), name


def test_tokens_are_counted_without_padding(stack, plain):
    objective = plain[()][2]
    indices = global_batch_indices(0, STEPS - 1, 4, len(objective.rows))
    assert stack["tasks, ZeRO 2"][3]["tokens"] == int(objective.rows.batch(indices)["attention_mask"].sum())
    pairs = plain[tuple(REWARD)][2]
    batch = pairs.rows.batch(global_batch_indices(0, STEPS - 1, 4, len(pairs.rows)))
    assert stack["reward, ZeRO 3"][3]["tokens"] == int(batch["attention_mask"].sum())


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("reward")])
def test_a_reward_model_is_saved_whole_and_normalised_on_training_pairs(stack, plain, case):
    folder = Path(stack[case][4]) / "model"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["MMaDARewardModel"]
    assert not (folder / "generation_config.json").exists()
    saved, expected = MMaDARewardModel.from_pretrained(folder), alone(plain, case)[1]
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(saved.get_parameter(name), parameter, rtol=1e-3, atol=5e-4)
    pairs = alone(plain, case)[2].preferences.train
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    scored = saved.score(load_tokenizer("bytes"), [pair.prompt for pair in pairs for _ in range(2)], texts)
    rewards = np.array([each.reward for each in scored])
    assert abs(rewards.mean()) < 1e-3 and rewards.var() == pytest.approx(1, abs=1e-2)


def test_every_pair_in_the_recipe_schema_that_can_be_learned_is_in_the_table():
    from typing import get_args

    from jobs.recipe_schema import DataSection, TrainSection

    objectives = get_args(TrainSection.model_fields["objective"].annotation)
    sources = get_args(DataSection.model_fields["source"].annotation)
    left_out = {(objective, source) for objective in objectives for source in sources} - OBJECTIVES.keys()
    assert left_out == {("reward", "stdlib"), ("reward", "hub"), ("reward", "mixture")}


# Weights to begin with.


@pytest.fixture(scope="module")
def trained(stack) -> str:
    return str(Path(stack["tasks, ZeRO 2"][4]))


@pytest.mark.parametrize("name", ["policy", "reward"])
def test_training_begins_with_the_weights_named(stack, trained, name):
    notes, weights = stack["begun"][name]
    saved = load_file(Path(trained) / "model" / "model.safetensors")
    trunk = [key for key in weights if key.startswith("model.")]
    assert len(trunk) > 20 and all(np.array_equal(weights[key], saved[key].numpy()) for key in trunk)
    assert notes[0].startswith(f"starting from the weights in {trained}/model")
    assert notes[0].endswith("with new heads" if name == "reward" else "model")
    assert weights.keys() - saved.keys() == ({key for key in weights if key.startswith("heads.")})


def test_weights_to_begin_with_pass_the_checks(trained, tmp_path):
    for keys in ([], REWARD):
        check(recipe_of(tmp_path, "cluster.expert_parallel=1", f"train.start_from={trained}", *keys))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.hidden_size=32"], r"has .* of shape \(264, 64\), and this recipe's model needs \(264, 32\)"),
        (["model.num_hidden_layers=3", "model.mlp_layer_types=[dense, moe, moe]"], "lacks model.layers.2"),
        (["model.num_hidden_layers=1", "model.mlp_layer_types=dense"], "has model.layers.1.*lacks"),
        (["train.start_from=/nowhere"], "train.start_from=/nowhere is not a folder"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_starts(trained, tmp_path, keys, said):
    with pytest.raises(RecipeError, match=said):
        check(recipe_of(tmp_path, "cluster.expert_parallel=1", f"train.start_from={trained}", *keys))


# What is refused.


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["tasks=null"], "tasks.family is missing"),
        (["data.source=stdlib"], "tasks.family='spell_backward' has no part in data.source=stdlib"),
        (["data.source=stdlib", *REWARD], "train.objective=reward finds no pairs"),
        (["data.path=x"], "data.path='x' has no meaning for data.source=tasks"),
        (["data.limit_documents=5"], "data.limit_documents=5 has no meaning for data.source=tasks"),
        (["tasks=null", "data.source=files", "data.path=/nowhere", *REWARD], "data.path=/nowhere does not exist"),
    ],
)
def test_recipes_whose_parts_do_not_go_together_are_refused(tmp_path, keys, said):
    given = {key.partition("=")[0]: key for key in [*COMMON, *keys]}
    if "tasks=null" in keys:
        given = {key: value for key, value in given.items() if not key.startswith("tasks")}
    with pytest.raises(RecipeError, match=said):
        check(load_recipe("debug", [f"run.dir={tmp_path}", *given.values()]))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["train.sequence_length=40"], "train.sequence_length=40 is too short for problem"),
        (["train.sequence_length=40", *REWARD], "train.sequence_length=40 is too short for a completion"),
        (["tasks.family=rush_hour", "train.sequence_length=900"], "tasks.family=rush_hour stores no answers"),
        (["tasks.family=no_such"], "tasks.family=no_such is unknown"),
    ],
)
def test_problems_that_cannot_be_learned_are_refused_before_anything_starts(tmp_path, keys, said):
    with pytest.raises(DataError, match=said):
        prepare_objective(recipe_of(tmp_path, *keys))


def test_the_driver_and_a_worker_speak_of_the_same_problems(tmp_path):
    recipe = recipe_of(tmp_path)
    driver, worker = prepare_objective(recipe), open_objective(recipe, None)
    assert driver.fingerprint == worker.fingerprint and driver.prepared is None
    assert "24 problems to learn from" in driver.announcement() and "7 held out" in driver.announcement()
    assert isinstance(worker.build_model(), MMaDAForCausalLM)
