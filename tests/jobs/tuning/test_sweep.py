"""A whole sweep as a user runs it, ended in every way there is and taken up again."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

MARK = "MMADA_TEST_SWEEP"
STATUS = {"done": "FINISHED", "stopped": "KILLED"}


class Sweeping:
    """Starts ``mmada`` in a folder, and knows every process that has come of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.sweep = folder / "runs" / "sweep"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        # Not in Ray's own session: pytest's environment may know one.
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**environment, MARK: self.mark, "PYTHONPATH": str(Path(__file__).parents[3])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def tune(self, *overrides: str) -> subprocess.Popen[str]:
        keys = ["run.name=sweep", "data.limit_documents=60", "train.steps=40", "train.evaluate_rows=4"]
        return self.start("tune", "tune-debug", *keys, *overrides)

    def trials(self) -> dict[int, dict[str, Any]]:
        book = self.sweep / "sweep.json"
        trials = json.loads(book.read_text())["trials"] if book.exists() else []
        return {each["number"]: each for each in trials}

    def processes(self, word: str = "") -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def until(self, driver: subprocess.Popen[str], holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + 240
        while not holds():
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline, "it takes too long"
            time.sleep(0.1)

    def all_gone(self) -> None:
        deadline = time.monotonic() + 120  # Ray's own agents notice late that their raylet has died
        while self.processes():
            assert time.monotonic() < deadline, [process.cmdline() for process in self.processes()]
            time.sleep(0.5)


@pytest.mark.timeout(900)
def test_a_sweep_that_is_ended_in_every_way_goes_on(tmp_path: Path) -> None:
    own = Sweeping(tmp_path)

    driver = own.tune()
    own.until(driver, lambda: any(trial["step"] >= 8 for trial in own.trials().values()))
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=90)[0]
    assert driver.returncode == 130 and "go on with run.resume=true" in said and "Traceback" not in said
    own.all_gone()

    driver = own.tune("run.resume=true")
    own.until(driver, lambda: any(trial["status"] in STATUS for trial in own.trials().values()))
    driver.kill()
    driver.communicate()
    own.all_gone()
    ended = {number: trial for number, trial in own.trials().items() if trial["status"] in STATUS}

    driver = own.tune("run.resume=true")
    for word in ("ResourceTrainable", "RayTrainWorker"):  # a trial, as Tune calls its class; a trainer's worker
        own.until(driver, lambda word=word: own.processes(word))
        own.processes(word)[0].kill()
    said = driver.communicate(timeout=400)[0]
    assert driver.returncode == 0 and "Traceback" not in said, said
    own.all_gone()

    trials = own.trials()
    assert sorted(trials) == [1, 2, 3, 4]
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
        status = STATUS.get(trial["status"], "FAILED")
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
    driver = own.start("train", str(own.sweep / "best.yaml"))
    said = driver.communicate(timeout=200)[0]
    assert driver.returncode == 0, said
    again = json.loads((own.folder / "runs" / "sweep-best" / "summary.json").read_text())
    assert again["metrics"]["bits_per_byte"] == summary["best"]["value"]
