"""``mmada ppo`` as a user runs it: real processes, real Ray, DeepSpeed and MLflow, and every part of it killed once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest

from jobs.recipe import load_recipe
from jobs.recipe_schema import RESOLVED_RECIPE
from jobs.rl.ledger import Entry, entries
from mmada.data import global_batch_indices
from mmada.model import MMaDAForCausalLM
from tests.patience import PATIENCE_S

ITERATIONS = 6
MMADA = [sys.executable, "-m", "jobs.cli"]
KEYS = [
    "run.dir=.",
    f"ppo.iterations={ITERATIONS}",
    "ppo.checkpoint_every=2",
    "ppo.rollout_threads=1",
    "cluster.threads_per_worker=1",
    'reward.parts=[{kind: function, name: "slow_reward:digits"}]',
]
# The least that reinforcement learning can be.
SMALL = ["cluster.workers=1", "cluster.expert_parallel=1", "ppo.rollout_workers=1", "ppo.reward_workers=1"]
# Worth a little time, so that there is always something under way to be killed.
REWARD = """
import time

def digits(prompts, completions, **kwargs):
    time.sleep(0.2)
    return [sum(c.isdigit() for c in completion) / 8 for completion in completions]
"""


def start(folder: Path, name: str, *overrides: str, recipe: str = "ppo-debug") -> subprocess.Popen:
    (folder / "slow_reward.py").write_text(REWARD)
    return subprocess.Popen(
        [*MMADA, "ppo", recipe, *KEYS, f"run.name={name}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, out + err
    return out


def steps_done(run_dir: Path) -> int:
    path = run_dir / "logs" / "trained.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max(
        (json.loads(line)["iteration"] + 1 for line in lines if '"trained"' in line and line[-1] == "}"), default=0
    )


def wait_for(condition, process: subprocess.Popen, what: str):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        assert process.poll() is None, f"ended before {what}: {process.communicate()}"
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {PATIENCE_S} s")


def actors_of(process: subprocess.Popen, kind: str) -> list[psutil.Process]:
    """The processes of a kind of actor, oldest first."""
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        try:
            if each.cmdline() and each.cmdline()[0].startswith(f"ray::{kind}"):
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda each: each.create_time())


def rewards_of(run_dir: Path) -> list[tuple[float, float]]:
    """(reward, loss) of every iteration, as done last."""
    rows = {}
    for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines():
        if line:
            row = json.loads(line)
            rows[row["step"]] = (row["reward"], row["loss"])
    return [rows[step] for step in sorted(rows)]


def check_ledger(run_dir: Path) -> list[Entry]:
    """Every prompt that the seed draws was sampled and learned from, once."""
    recipe = load_recipe(run_dir / RESOLVED_RECIPE)
    assert recipe.ppo is not None and recipe.tasks is not None
    found = entries(run_dir)
    assert [entry.iteration for entry in found] == list(range(recipe.ppo.iterations))
    for entry in found:
        drawn = global_batch_indices(
            recipe.run.seed, entry.iteration, recipe.ppo.prompts_per_iteration, recipe.tasks.size
        )
        assert entry.prompts == drawn.tolist()
        assert entry.lost == [] and entry.doubled == [] and entry.dropped == {}
        assert set(entry.versions.values()) == {entry.iteration}
    totals = json.loads((run_dir / "summary.json").read_text())["ledger"]
    samples = recipe.ppo.prompts_per_iteration * recipe.ppo.samples_per_prompt
    assert totals == {
        "trained": recipe.ppo.iterations * samples,
        "dropped": 0,
        "lost": 0,
        "doubled": 0,
        "skipped_iterations": 0,
    }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> tuple[Path, str]:
    """A run that nothing happens to, and what it said."""
    said = finish(start(folder, "undisturbed"))
    return folder / "undisturbed", said


def test_the_debug_recipe_learns_with_experts_on_two_learners(undisturbed: tuple[Path, str]):
    run_dir, said = undisturbed
    check_ledger(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "done" and summary["steps"] == ITERATIONS
    assert summary["logprob_gap"] < 1e-5 and summary["rewards_failed"] == 0
    rewards = [reward for reward, _ in rewards_of(run_dir)]
    assert (summary["reward_first"], summary["reward_last"]) == (rewards[0], rewards[-1])
    assert 0 <= summary["accuracy_before"] <= 1 and 0 <= summary["accuracy_after"] <= 1
    assert summary["completion_tokens_per_second"] > 0
    assert "Traceback" not in said and "Warning" not in said
    assert "2 learners, 2 rollout actors, 2 reward actors" in said


def test_a_checkpoint_holds_everything(undisturbed: tuple[Path, str]):
    run_dir, _ = undisturbed
    newest = run_dir / "checkpoints" / f"step-{ITERATIONS:08d}"
    policy = MMaDAForCausalLM.from_pretrained(newest / "model")
    reference = MMaDAForCausalLM.from_pretrained(newest / "reference")
    moved = [(a - b).abs().max() for a, b in zip(policy.parameters(), reference.parameters(), strict=True)]
    assert max(moved) > 1e-4
    assert len((newest / "ledger.jsonl").read_text().splitlines()) == ITERATIONS
    assert {path.name for path in newest.iterdir()} >= {"others.safetensors", "engine", "random-0.pt", "random-1.pt"}


def test_mlflow_has_the_curves_the_texts_and_the_figure(undisturbed: tuple[Path, str], folder: Path):
    run_dir, _ = undisturbed
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    run_id = json.loads((run_dir / "summary.json").read_text())["mlflow_run_id"]
    for name in (
        "reward", "reward_part.digits", "kl", "reference_kl", "clip_fraction", "entropy", "value_loss",
        "explained_variance", "logprob_gap", "staleness", "sampling_tokens_per_second",
        "learning_tokens_per_second", "waiting_seconds", "learning_seconds", "sampling_seconds",
    ):  # fmt: skip
        assert {point.step for point in client.get_metric_history(run_id, name)} == set(range(1, ITERATIONS + 1)), name
    accuracy = {point.step for point in client.get_metric_history(run_id, "held_out_accuracy")}
    assert accuracy == {0, ITERATIONS}
    table = mlflow.artifacts.load_dict(client.get_run(run_id).info.artifact_uri + "/tables/samples.json")
    assert {"prompt", "completion", "reward", "version"} <= set(table["columns"]) and len(table["data"]) >= 8
    figures = [file.path for file in client.list_artifacts(run_id, "figures")]
    assert figures == ["figures/reward_curve.png"]


def test_every_part_may_be_killed(undisturbed: tuple[Path, str], folder: Path):
    """A rollout actor, a reward actor, a learner, and at last the driver: the run is as if nothing had happened."""
    process, run_dir = start(folder, "killed"), folder / "killed"
    wait_for(lambda: steps_done(run_dir) >= 1, process, "the first iteration")
    actors_of(process, "RolloutWorker")[0].kill()
    wait_for(lambda: steps_done(run_dir) >= 2, process, "the second iteration")
    actors_of(process, "RewardWorker")[0].kill()
    wait_for(lambda: steps_done(run_dir) >= 3, process, "the third iteration")
    learners = json.loads((run_dir / "workers.json").read_text())
    os.kill(learners[1]["pid"], signal.SIGKILL)
    wait_for(lambda: steps_done(run_dir) >= 5, process, "the fifth iteration")
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    said = process.communicate()[0]
    assert "rollout actor" in said and "reward actor" in said and "s of its work lost" in said
    assert said.count("replaced after") == 2 and "going on from step-00000002" in said
    assert "learners back after" in said and "to be done again: " in said

    resumed = finish(start(folder, "killed", "run.resume=true"))
    assert "going on from step-00000004" in resumed
    check_ledger(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "done" and summary["accuracy_before"] is not None
    # The weights, the prompts and every sample's seed are as they would have been.
    for ours, theirs in zip(rewards_of(run_dir), rewards_of(undisturbed[0]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    _, alive = psutil.wait_procs(everyone, timeout=280)
    assert alive == []


def test_every_mixer_and_byte_patches_keep_the_gap_closed(folder: Path):
    """In one model, sampled one step behind, learned with GRPO at ZeRO 3."""
    mixers = ["model.mixer_types=attention,ssm,hybrid,memory", "model.num_hidden_layers=4"]
    patches = ["model.patches={mode: space, local_size: 32}", "cluster.expert_parallel=1"]
    learning = ["train.zero_stage=3", "ppo.algorithm=grpo", "ppo.max_staleness=1", "ppo.iterations=3"]
    finish(start(folder, "mixed", "ppo.checkpoint_every=0", *mixers, *patches, *learning))
    summary = json.loads((folder / "mixed" / "summary.json").read_text())
    assert summary["status"] == "done" and summary["logprob_gap"] < 1e-5
    found = entries(folder / "mixed")
    assert [entry.lost + entry.doubled for entry in found] == [[], [], []]
    assert {entry.iteration - version for entry in found for version in entry.versions.values()} == {0, 1}


def test_a_failing_reward_ends_the_run_with_one_line(folder: Path):
    (folder / "broken_reward.py").write_text("def nothing(prompts, completions, **kwargs):\n    return [0.0]\n")
    parts = 'reward.parts=[{kind: function, name: "broken_reward:nothing"}]'
    said = finish(start(folder, "broken", parts, *SMALL), code=1)
    line = next(line for line in said.splitlines() if line.startswith("failed"))
    assert "gave 1 numbers for" in line and "ppo.max_reward_failures=0.1" in line and "mend the reward" in line
    assert "Traceback" not in said
