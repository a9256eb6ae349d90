"""A whole sweep as a user runs it, ended in every way there is and taken up again."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.cluster.head import TOKEN, Head, living, marked, plain_environment, running_head
from tests.cluster.test_session import MARK, processes_with
from tests.patience import PATIENCE_S

STATUS = {"done": "FINISHED", "stopped": "KILLED"}


class Sweeping:
    """Starts ``mmada`` in a folder, on a cluster, and knows every process that has come of it."""

    def __init__(self, folder: Path, head: Head) -> None:
        self.folder, self.head, self.mark = folder, head, uuid.uuid4().hex
        self.sweep = folder / "runs" / "sweep"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        own = {MARK: self.mark, "PYTHONPATH": str(Path(__file__).parents[3])}
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *arguments],
            cwd=self.folder,
            env=plain_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, **own),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def tune(self, *overrides: str) -> subprocess.Popen[str]:
        keys = ["run.name=sweep", "data.limit_documents=60", "train.steps=40", "train.evaluate_rows=4"]
        keys += [f"cluster.address={self.head.address}", "cluster.max_failures=1"]
        return self.start("tune", "tune-debug", *keys, *overrides)

    def trials(self) -> dict[int, dict[str, Any]]:
        book = self.sweep / "sweep.json"
        trials = json.loads(book.read_text())["trials"] if book.exists() else []
        return {each["number"]: each for each in trials}

    def ended(self) -> dict[int, dict[str, Any]]:
        return {number: trial for number, trial in self.trials().items() if trial["status"] in STATUS}

    def until(self, driver: subprocess.Popen[str], holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline, "it takes too long"
            time.sleep(0.1)

    def all_gone(self) -> None:
        """Nothing of it is on the cluster any more, nor a process beside it."""
        deadline = time.monotonic() + 60
        while (left := processes_with(self.mark)) or any(living(self.head.url).values()):
            assert time.monotonic() < deadline, (left, living(self.head.url))
            time.sleep(0.5)
        titles = (" ".join(process.cmdline()) for process in marked(self.head.mark))
        assert [title for title in titles if "Train" in title] == []

    def holds_what_runs(self) -> bool:
        """Whether the cluster holds as many controllers, workers and places as trials are running now."""
        running = [number for number, trial in self.trials().items() if trial["status"] == "running"]
        held = living(self.head.url)
        assert {"DatasetManager", "PreemptionWatcher"}.isdisjoint(held["actors"]), "Ray Train starts more than is used"
        counts = [held["actors"].count(name) for name in ("TrainController", "RayTrainWorker")]
        after = [number for number, trial in self.trials().items() if trial["status"] == "running"]
        # A trial has a place of its own, and another for its worker.
        return running == after and [*counts, len(held["placement_groups"])] == [len(running)] * 2 + [2 * len(running)]


@pytest.mark.timeout(900)
def test_a_sweep_that_is_ended_in_every_way_goes_on(tmp_path: Path) -> None:
    with running_head(tmp_path) as head:
        _end_it_in_every_way(Sweeping(tmp_path, head))


def _end_it_in_every_way(own: Sweeping) -> None:
    driver = own.tune()
    own.until(driver, lambda: any(trial["step"] >= 8 for trial in own.trials().values()))
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=90)[0]
    assert driver.returncode == 130 and "go on with run.resume=true" in said and "Traceback" not in said, said
    own.all_gone()

    driver = own.tune("run.resume=true")
    own.until(driver, own.ended)
    driver.kill()
    driver.communicate()
    own.all_gone()
    ended = own.ended()

    driver = own.tune("run.resume=true")
    for word in ("ResourceTrainable", "RayTrainWorker"):  # a trial, as Tune calls its class; a trainer's worker
        own.until(driver, lambda word=word: own.head.processes(word))
        own.head.processes(word)[0].kill()
    own.until(driver, lambda: {*own.ended()} - {*ended} and own.holds_what_runs())
    said = driver.communicate(timeout=PATIENCE_S)[0]
    assert driver.returncode == 0 and "Traceback" not in said, said
    own.all_gone()

    trials = own.trials()
    assert sorted(trials) == sorted(own.ended()) == [1, 2, 3, 4]  # and none has failed
    assert {number: trials[number] for number in ended} == ended, "what had ended has run again"
    _tree_has_every_trial_once(own, trials)
    _best_is_what_it_says(own, trials)


def _tree_has_every_trial_once(own: Sweeping, trials: dict[int, dict[str, Any]]) -> None:
    client = MlflowClient(f"sqlite:///{own.folder / 'runs' / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "tune-debug"]
    runs = client.search_runs([experiment.experiment_id])
    (root,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert (root.info.run_name, root.info.status) == ("sweep", "FINISHED")
    below: dict[str, list[Any]] = {}
    for run in runs:
        below.setdefault(run.data.tags.get("mlflow.parentRunId", ""), []).append(run)
    seen = {run.info.run_name: run for run in below[root.info.run_id]}
    assert len(below[root.info.run_id]) == 4
    for number, trial in trials.items():
        run = seen[f"trial-{number:04d}"]
        (attempt,) = below[run.info.run_id]
        status = STATUS[trial["status"]]
        assert (run.info.status, attempt.info.status) == (status, status), (number, trial)
    assert len(runs) == 9


def _best_is_what_it_says(own: Sweeping, trials: dict[int, dict[str, Any]]) -> None:
    """The recipe trains as it is and comes to the trial's number, to the bit."""
    summary = json.loads((own.sweep / "summary.json").read_text())
    done = {
        number: trial["values"][str(trial["step"])] for number, trial in trials.items() if trial["status"] == "done"
    }
    assert summary["best"]["value"] == min(done.values()) == done[summary["best"]["trial"]]
    rows = [*csv.DictReader((own.sweep / "trials.csv").read_text().splitlines())]
    assert [(int(row["trial"]), row["status"]) for row in rows] == [(n, trials[n]["status"]) for n in sorted(trials)]
    driver = own.start("train", str(own.sweep / "best.yaml"), "cluster.address=null")
    said = driver.communicate(timeout=PATIENCE_S)[0]
    assert driver.returncode == 0, said
    again = json.loads((own.folder / "runs" / "sweep-best" / "summary.json").read_text())
    assert again["metrics"]["bits_per_byte"] == summary["best"]["value"]
