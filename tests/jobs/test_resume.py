"""Going on from a checkpoint: exactly at the same topology, on the same curve at another one."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.errors import ClusterError
from jobs import export
from jobs.progress import METRICS_FILE, read_metrics
from tests.jobs.workers import bare_curve, run_all, run_together, small_recipe

STEPS, HALF = 8, 4
# (workers, ZeRO stage, expert parallel) of the run that stops, and of those that go on from it.
SOURCES = [(2, 1, 1), (2, 2, 2), (2, 3, 2), (1, 1, 1)]
TARGETS = [(1, 1, 1), (1, 2, 1), (1, 3, 1), (2, 1, 2), (2, 3, 1), (2, 0, 1)]
PAIRS = [(source, target) for source in SOURCES for target in TARGETS if source != target]


def recipe_for(run_dir, topology):
    workers, zero_stage, expert_parallel = topology
    fixed = {
        "cluster.workers": workers,
        "cluster.expert_parallel": expert_parallel,
        "train.zero_stage": zero_stage,
        "train.steps": STEPS,
        "train.warmup_steps": 2,
        "train.checkpoint_every": HALF,
        "model.num_experts_per_tok": 4,  # every expert: rounding has no choice to flip
        "model.router_bias_update_rate": 0.01,
    }
    return small_recipe(run_dir, **fixed)


def losses_of(jobs, prepared):
    """(losses by step, notes) of every job (recipe, run_dir, stop)."""
    return [({row["step"]: row["loss"] for row in rows}, notes) for rows, notes, _ in run_all(jobs, prepared)]


NEVER = 10**9


def run(recipe, run_dir, prepared, stop=NEVER):
    return losses_of([(recipe, run_dir, stop)], prepared)[0]


@pytest.fixture(scope="module")
def bare(prepared, tmp_path_factory):
    """The uninterrupted curve, and the weights at its end."""
    recipe = recipe_for(tmp_path_factory.mktemp("bare"), (1, 0, 1))
    curve, model = bare_curve(recipe, prepared, STEPS)
    return [loss for loss, _ in curve], model.state_dict()


@pytest.fixture(scope="module")
def continued(prepared, tmp_path_factory):
    """Losses and notes of every target that went on from every source's checkpoint of step HALF."""
    folder = tmp_path_factory.mktemp("topologies")
    for world in (1, 2):
        saves = [(recipe_for(folder, t), folder / str(t), HALF) for t in SOURCES if t[0] == world]
        losses_of(saves, prepared)
    found = {}
    for world in (1, 2):
        pairs = [(source, target) for source, target in PAIRS if target[0] == world]
        jobs = []
        for source, target in pairs:
            again = folder / f"{source} to {target}"
            shutil.copytree(folder / str(source) / "checkpoints", again / "checkpoints")
            jobs.append((recipe_for(folder, target), again, NEVER))
        found |= dict(zip(pairs, losses_of(jobs, prepared), strict=True))
    return found


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
@pytest.mark.timeout(900)
def test_another_topology_goes_on_on_the_same_curve(source, target, continued, bare):
    """Compared at the steps after the first too: a lost moment or step count shows only there."""
    losses, notes = continued[source, target]
    assert any("converted" in note for note in notes)
    assert sorted(losses) == list(range(HALF + 1, STEPS + 1))
    for step, loss in losses.items():
        assert loss == pytest.approx(bare[0][step - 1], rel=1e-5), f"step {step}"


def tensors_of(folder):
    """Every tensor in a checkpoint's engine files, by file and place."""
    found = {}

    def walk(value, name):
        if torch.is_tensor(value):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}/{key}")
        elif isinstance(value, (list, tuple)):
            for index, inner in enumerate(value):
                walk(inner, f"{name}/{index}")

    for path in sorted(folder.rglob("*.pt")):
        walk(torch.load(path, weights_only=False), str(path.relative_to(folder)))
    return found


SAME = [(1, 0, 1), (2, 1, 1), (2, 2, 2), (2, 3, 1), (2, 3, 2)]


@pytest.fixture(scope="module")
def resumed(prepared, tmp_path_factory):
    """By topology: the folder, and the results of a whole run, of one that stopped, and of one that went on from it."""
    folder, found = tmp_path_factory.mktemp("same"), {}
    for world in (1, 2):
        mine = [t for t in SAME if t[0] == world]
        jobs = []
        for topology in mine:
            recipe, place = recipe_for(folder, topology), folder / str(topology)
            jobs += [
                (recipe, place / "whole", NEVER),
                (recipe, place / "halves", HALF),
                (recipe, place / "halves", NEVER),
            ]
        results = losses_of(jobs, prepared)
        found |= {t: (folder / str(t), *results[3 * i : 3 * i + 3]) for i, t in enumerate(mine)}
    return found


@pytest.mark.parametrize("topology", SAME, ids=str)
@pytest.mark.timeout(600)
def test_the_same_topology_resumes_bit_for_bit(topology, resumed):
    folder, (straight, _), (first, _), (second, notes) = resumed[topology]
    whole, halves = folder / "whole", folder / "halves"
    assert f"going on from step-{HALF:08d}" in notes
    assert first | second == straight
    name = f"step-{STEPS:08d}"
    expected, found = (tensors_of(run_dir / "checkpoints" / name) for run_dir in (whole, halves))
    assert expected.keys() == found.keys() and len(expected) > 20
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    weights = [load_file(run_dir / "checkpoints" / name / "model" / "model.safetensors") for run_dir in (whole, halves)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    read = [rows_read(run_dir) for run_dir in (whole, halves)]
    assert read[0] == read[1]
    assert sum(len(rows) for rows in read[0].values()) == STEPS * 8  # nothing skipped, nothing twice


def rows_read(run_dir):
    """Rows by (step, rank), from the workers' own record."""
    return {
        (line["step"], path.stem): line["rows"]
        for path in (run_dir / "logs").glob("rows-*.jsonl")
        for line in map(json.loads, path.read_text().splitlines())
    }


@pytest.mark.parametrize("topology", SAME, ids=str)
def test_export_from_any_topology_is_the_bare_loops_model(topology, resumed, bare, tmp_path):
    assert export.run(str(resumed[topology][0] / "whole"), str(tmp_path / "exported")) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    for name, tensor in bare[1].items():
        assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    prompt = tokenizer("The ", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert written.shape[1] == prompt.input_ids.shape[1] + 3


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(prepared, tmp_path):
    run_dir, topology = tmp_path / "run", (1, 1, 1)
    straight, _ = run(recipe_for(tmp_path, topology), run_dir, prepared)
    victim = next((run_dir / "checkpoints" / f"step-{STEPS:08d}" / "engine").rglob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    losses, notes = run(recipe_for(tmp_path, topology), run_dir, prepared)
    assert any(f"step-{STEPS:08d}" in note and victim.name in note for note in notes)
    assert f"going on from step-{HALF:08d}" in notes
    assert losses == {step: loss for step, loss in straight.items() if step > HALF}
    (run_dir / "checkpoints" / f"step-{HALF:08d}" / "random-0.pt").unlink()
    with pytest.raises(ClusterError, match=r"random-0.pt"):
        export.run(str(run_dir / "checkpoints" / f"step-{HALF:08d}"), str(tmp_path / "out"))


def die_after_sealing(rank, recipe, run_dir, prepared):
    from jobs.worker import TrainingWorker

    (run_dir / "logs").mkdir(parents=True)
    worker = TrainingWorker(recipe, run_dir, prepared, torch.device("cpu"), lambda message: None)
    seal = worker.store.seal

    def seal_and_die(*arguments):
        seal(*arguments)
        os._exit(9)

    worker.store.seal = seal_and_die
    worker.run()


def test_a_checkpoint_never_covers_steps_whose_metrics_are_lost(prepared, tmp_path):
    """Death right after a checkpoint became the current one: a resume skips its steps, so they must be on disk."""
    run_dir, recipe = tmp_path / "run", recipe_for(tmp_path, (1, 0, 1))
    with pytest.raises(ProcessExitedException, match="exit code 9"):
        run_together(1, die_after_sealing, recipe, run_dir, prepared)
    with (run_dir / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "lo')  # what another moment of death would have left
    losses, notes = run(recipe, run_dir, prepared)
    assert f"going on from step-{HALF:08d}" in notes and sorted(losses) == list(range(HALF + 1, STEPS + 1))
    assert [row["step"] for row in read_metrics(run_dir, up_to=STEPS)] == list(range(1, STEPS + 1))


def test_without_zero_any_number_of_workers_goes_on(prepared, bare, tmp_path):
    run(recipe_for(tmp_path, (1, 0, 1)), tmp_path / "run", prepared, stop=HALF)
    losses, notes = run(recipe_for(tmp_path, (2, 0, 1)), tmp_path / "run", prepared)
    assert f"going on from step-{HALF:08d}" in notes and sorted(losses) == list(range(HALF + 1, STEPS + 1))
    for step, loss in losses.items():
        assert loss == pytest.approx(bare[0][step - 1], rel=1e-5), f"step {step}"


def test_a_checkpoint_without_zero_is_refused_at_another_topology(prepared, tmp_path):
    run_dir = tmp_path / "run"
    run(recipe_for(tmp_path, (1, 0, 1)), run_dir, prepared)
    with pytest.raises(Exception, match=r"train.zero_stage=2 cannot take up a checkpoint of ZeRO stage 0"):
        run(recipe_for(tmp_path, (1, 2, 1)), run_dir, prepared)
