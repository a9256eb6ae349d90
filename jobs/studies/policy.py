"""One trial of a study of reinforcement learning: a warm-up that all variants of a seed share, then ``mmada ppo``.

Both run as a user runs them, with Ray and MLflow, and take the whole machine: trials go one after the other. The runs
stay where ``run.dir`` is set in the study's overrides, and vanish with the study where it is not. A study that begins
again with the same ``run.dir`` takes those that are done with the same settings as they are.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.progress import read_metrics
from jobs.recipe import load_recipe
from jobs.studies.study import PolicyTask

if TYPE_CHECKING:
    from jobs.studies.trial import Trial

DONE = "study.json"  # in a run's folder, once the run is done


def run_policy_trial(trial: Trial) -> dict[str, float]:
    """Warm up if this seed has not been, improve, and measure; every measure of ``PolicyTask`` by name."""
    assert isinstance(trial.study.task, PolicyTask)
    folder = runs_folder(trial)
    warm_up, warm_keys = folder / f"warm-up-{trial.seed}", warm_up_keys(trial)
    if finished(warm_up, trial, warm_keys) is None:
        shutil.rmtree(warm_up, ignore_errors=True)
        warm(trial, warm_up, warm_keys)
        finish(warm_up, trial, warm_keys)
    name = f"{trial.variant.replace(' ', '-')}-{trial.seed}"
    keys = [*trial.study.overrides(trial.variant, trial.seed), *trial.overrides, f"run.dir={folder}"]
    if finished(folder / name, trial, keys) is None:
        shutil.rmtree(folder / name, ignore_errors=True)
        started = time.perf_counter()
        mmada("ppo", trial.study.recipe, [*keys, f"ppo.start_from={warm_up}", f"run.name={name}"])
        finish(folder / name, trial, keys, minutes=(time.perf_counter() - started) / 60)
    minutes = (finished(folder / name, trial, keys) or {})["minutes"]
    summary = json.loads((folder / name / "summary.json").read_text())
    rewards = [row["reward"] for row in read_metrics(folder / name, up_to=sys.maxsize)]
    return {
        "before": summary["accuracy_before"],
        "after": summary["accuracy_after"],
        "gain": summary["accuracy_after"] - summary["accuracy_before"],
        "minutes": minutes,
        "reward variance": statistics.pvariance(rewards),
        "reward jitter": jitter(rewards),
        "gap": summary["logprob_gap"],
    }


def finished(run_dir: Path, trial: Trial, keys: list[str]) -> dict[str, Any] | None:
    """What ``finish`` noted of a run that was done with these very settings; None where there is no such run."""
    note = run_dir / DONE
    found = json.loads(note.read_text()) if note.exists() else {}
    return found if found.get("settings") == settings_of(trial, keys) else None


def finish(run_dir: Path, trial: Trial, keys: list[str], **values: Any) -> None:
    """Note that a run is done, and with what."""
    (run_dir / DONE).write_text(json.dumps({"settings": settings_of(trial, keys), **values}) + "\n")


def settings_of(trial: Trial, keys: list[str]) -> dict[str, Any]:
    """Everything that decides what a run does: the recipe as it stands now and what is set over it."""
    task = trial.study.task
    assert isinstance(task, PolicyTask)
    rule = {"least_before": task.least_before, "more_steps": task.more_steps}
    return {"recipe": load_recipe(trial.study.recipe, keys).model_dump(mode="json"), "warm_up": rule}


def warm_up_keys(trial: Trial) -> list[str]:
    """What is set in the warm-up of a trial's seed."""
    study, folder = trial.study, runs_folder(trial)
    assert isinstance(study.task, PolicyTask)
    keys = [*study.common, *study.task.warm_up, *trial.overrides, f"run.seed={trial.seed}"]
    return [*keys, f"run.dir={folder}", f"run.name=warm-up-{trial.seed}"]


def warm(trial: Trial, run_dir: Path, keys: list[str]) -> None:
    """Train on answers until enough problems are solved; raises RuntimeError where ten times the steps do not do."""
    study = trial.study
    assert isinstance(study.task, PolicyTask)
    first = load_recipe(study.recipe, keys).train.steps
    for steps in range(first, 10 * first, study.task.more_steps):
        mmada("train", study.recipe, [*keys, f"train.steps={steps}", f"run.resume={str(steps > first).lower()}"])
        if read_metrics(run_dir, up_to=steps)[-1]["held_out_accuracy"] >= study.task.least_before:
            return
    raise RuntimeError(
        f"the warm-up in {run_dir} does not solve {study.task.least_before:.0%} of the held-out problems"
    )


def jitter(rewards: list[float]) -> float:
    """The variance of a batch's mean reward about its trend: half of the mean squared difference of neighbours.

    The plain variance over all updates counts what was learned as noise (von Neumann 1941).
    """
    return statistics.fmean((after - before) ** 2 for before, after in zip(rewards, rewards[1:], strict=False)) / 2


def runs_folder(trial: Trial) -> Path:
    """Where the runs lie: ``run.dir`` of the overrides, or beside what the study keeps for its duration."""
    named = [each.partition("=")[2] for each in trial.overrides if each.startswith("run.dir=")]
    return Path(named[-1]).expanduser().resolve() if named else Path(trial.first).parent


def mmada(verb: str, recipe: str, keys: list[str]) -> None:
    """Run a verb in a process of its own. Raises RuntimeError with its last line where it fails."""
    command = [sys.executable, "-m", "jobs.cli", verb, recipe, *keys]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise RuntimeError(f"mmada {verb} {recipe} {' '.join(keys)} failed: {lines[-1] if lines else done.returncode}")
