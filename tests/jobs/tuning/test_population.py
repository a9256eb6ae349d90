"""Population-based training as a user runs it: a trial that is behind goes on from the checkpoint of one ahead."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from jobs.progress import read_metrics
from tests.patience import PATIENCE_S

KEYS = (
    "run.name=sweep",
    "data.limit_documents=60",
    "cluster.threads_per_worker=1",
    "train.steps=60",
    "train.checkpoint_every=12",
    "train.evaluate_every=12",
    "train.evaluate_rows=4",
    "tune.space={train.learning_rate: {loguniform: [1e-5, 1e-2]}}",
    "tune.trials=2",
    "tune.scheduler=pbt",
    "tune.grace_period=12",
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("population")
    command = [sys.executable, "-m", "jobs.cli", "tune", "tune-debug", f"run.dir={folder}", *KEYS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert "goes on from a better trial after step" in done.stdout
    summary = json.loads((folder / "sweep" / "summary.json").read_text())
    assert summary["trials"] == {"done": 2, "stopped": 0, "failed": 0, "running": 0}
    return folder / "sweep"


def takeovers(sweep: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Attempts that began from another trial's checkpoint, with what their folder says of that."""
    for file in sorted(sweep.glob("trials/*/attempt-*/origin.json")):
        origin = json.loads(file.read_text())
        if origin["from"] is not None:
            yield file.parent, origin


def loss_at(attempt: Path, step: int) -> float | None:
    return next((row["loss"] for row in read_metrics(attempt, up_to=sys.maxsize) if row["step"] == step), None)


def test_the_copied_trials_first_loss_is_the_donors_next(sweep: Path) -> None:
    """The weights, the place in the data and the random numbers are the donor's, and so is the first loss, to the bit;
    what follows is learned at another rate."""
    compared = 0
    for attempt, origin in takeovers(sweep):
        step, donor = origin["from"]["step"], sweep / "trials" / f"trial-{origin['from']['trial']:04d}"
        donors = [loss for each in donor.glob("attempt-*") if (loss := loss_at(each, step + 1)) is not None]
        assert min(row["step"] for row in read_metrics(attempt, up_to=sys.maxsize)) == step + 1
        if donors:  # it may have been stopped at that very step
            assert loss_at(attempt, step + 1) in donors
            compared += 1
        assert loss_at(attempt, step + 2) not in {loss_at(each, step + 2) for each in donor.glob("attempt-*")}
    assert compared


def test_mlflow_has_what_changed_where_it_changed(sweep: Path) -> None:
    client = MlflowClient(f"sqlite:///{sweep.parent / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "tune-debug"]
    runs = client.search_runs([experiment.experiment_id])
    trials = {run.info.run_name: run for run in runs if run.data.tags.get("mmada.kind") == "trial"}
    assert sorted(trials) == ["trial-0001", "trial-0002"]
    wanted: dict[str, list[tuple[int, float]]] = {}
    for attempt, origin in takeovers(sweep):
        point = (origin["from"]["step"], origin["settings"]["train.learning_rate"])
        wanted.setdefault(attempt.parent.name, []).append(point)
    for name, run in trials.items():
        points = client.get_metric_history(run.info.run_id, "changed.train.learning_rate")
        assert [(point.step, point.value) for point in points] == wanted.get(name, [])
        attempts = [each for each in runs if each.data.tags.get("mlflow.parentRunId") == run.info.run_id]
        assert len(attempts) == len([*(sweep / "trials" / name).glob("attempt-*")]) == len(wanted.get(name, [])) + 1
        first = json.loads((sweep / "trials" / name / "attempt-1" / "origin.json").read_text())
        assert float(run.data.params["train.learning_rate"]) == first["settings"]["train.learning_rate"]
        losses = client.get_metric_history(run.info.run_id, "bits_per_byte")
        assert [point.step for point in losses] == sorted({point.step for point in losses}), "one point for each"
        assert not [tag for tag in run.data.tags if tag.startswith("resumed.")]


def test_the_readmes_pictures_are_drawn_from_it(sweep: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "docs" / "pictures.py"
    subprocess.run([sys.executable, script, sweep, tmp_path], check=True, timeout=120)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "mlflow-tree.svg").read_text()
    names = ["sweep", "trial-0001", "trial-0002", *(attempt.name for attempt, _ in takeovers(sweep))]
    assert [name for name in names if name not in drawn] == []
