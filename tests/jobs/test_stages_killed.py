"""A run of three stages through Ray, killed three times with SIGKILL, is the run that nobody touched, to the bit.

Checkpoints lie at both edges of the second stage and in its middle. A worker dies in the second stage behind the first
edge, the driver and all workers when the middle has been saved, and a worker again in the third stage.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import torch
from safetensors.torch import load_file

from jobs.progress import read_metrics
from tests.jobs.test_resume import tensors_of
from tests.jobs.test_stages import STAGES, staged, without_times
from tests.jobs.test_train import MMADA, processes_of, sealed
from tests.patience import PATIENCE_S

EVERY = 6  # steps between checkpoints, each with an evaluation: time enough to strike between two of them
EDGE, MIDDLE, OTHER_EDGE, END = EVERY, 2 * EVERY, 3 * EVERY, 4 * EVERY
# The last stage might go on for two steps more; its evaluations end it.
GOOD_ENOUGH = {"when": "threshold", "metric": "held_out_bits", "threshold": 100.0, "times": END - OTHER_EDGE}
LONGER = [
    {**STAGES[0], "steps": EDGE},
    {**STAGES[1], "steps": OTHER_EDGE - EDGE},
    {**STAGES[2], "steps": END - OTHER_EDGE + 2, "advance": GOOD_ENOUGH},
]


class Run:
    """One run's command, as a user would start it; what it started is gone when the test ends."""

    def __init__(self, folder: Path, name: str, *overrides: str) -> None:
        self.folder = folder / name
        self.process = subprocess.Popen(
            [*MMADA, "train", f"{name}.yaml", "cluster.max_failures=2", *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        self.started: list[psutil.Process] = []

    def done(self, step: int) -> None:
        """Wait until a worker has done this step."""
        self._wait(lambda: read_metrics(self.folder, up_to=END)[step - 1 :], f"step {step}")

    def saved(self, step: int) -> None:
        """Wait until the checkpoint of this step is good."""
        self._wait(sealed(self.folder, step), f"checkpoint of step {step}")
        self.started = psutil.Process(self.process.pid).children(recursive=True)

    def kill_worker(self) -> None:
        """kill -9 of the last worker."""
        victims = json.loads((self.folder / "workers.json").read_text())
        os.kill(victims[-1]["pid"], signal.SIGKILL)

    def kill_all(self) -> None:
        """kill -9 of the driver and every worker. Ray's own processes must then go by themselves.

        All but its agents, which first try for a minute to tell Ray's dead head of it: ``end`` sees to them.
        """
        others = [process for process in self.started if not is_agent(process)]
        workers = json.loads((self.folder / "workers.json").read_text())
        for pid in (self.process.pid, *(worker["pid"] for worker in workers)):
            os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=PATIENCE_S)
        assert psutil.wait_procs(others, timeout=60)[1] == []

    def finish(self) -> str:
        """What it said, when it has ended well."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        assert (self.process.returncode, err) == (0, ""), out + err
        assert processes_of(self.folder) == []
        return out

    def end(self) -> None:
        """Whatever state a failed test has left."""
        if self.process.poll() is None:
            self.started += psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.communicate(timeout=PATIENCE_S)
        for process in psutil.wait_procs(self.started, timeout=0)[1]:
            process.kill()

    def _wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.process.communicate()}"
            assert time.monotonic() < deadline, f"no {what} within {PATIENCE_S} s"
            time.sleep(0.005)


def is_agent(process: psutil.Process) -> bool:
    """Whether it is one of the agents that Ray puts on every node."""
    try:
        return "Agent" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=["one worker", "two workers"])
def runs(request, tmp_path_factory) -> Iterator[tuple[Path, Path, str, str]]:
    """Folders of the whole run and of the killed one, and what the former said, and the latter when it went on."""
    workers, zero_stage = request.param
    folder, started = tmp_path_factory.mktemp("killed"), []

    def start(name: str, *overrides: str) -> Run:
        started.append(Run(folder, name, *overrides))
        return started[-1]

    for name in ("whole", "killed"):
        staged(folder, name, workers, zero_stage, stages=LONGER, checkpoint_every=EVERY, evaluate_every=1)
    try:
        undisturbed = start("whole").finish()
        first = start("killed")
        first.done(EDGE + 1)
        first.kill_worker()
        first.saved(MIDDLE)
        first.kill_all()
        second = start("killed", "run.resume=true")
        second.done(OTHER_EDGE + 1)
        second.kill_worker()
        yield folder / "whole", folder / "killed", undisturbed, second.finish()
    finally:
        for run in started:
            run.end()


@pytest.mark.timeout(2400)
def test_a_killed_run_is_the_whole_one(runs):
    whole, killed, _, _ = runs
    # Every start of the workers begins a paragraph of the metrics that they write down. What they tell the driver may
    # die with them.
    parts = (killed / "logs" / "metrics.jsonl").read_text().strip().split("\n\n")
    assert [json.loads(part.splitlines()[0])["step"] for part in parts] == [1, EDGE + 1, MIDDLE + 1, OTHER_EDGE + 1]
    rows, expected = (without_times(read_metrics(folder, up_to=END)) for folder in (killed, whole))
    assert [row["stage"] for row in expected] == [1] * EDGE + [2] * 2 * EVERY + [3] * EVERY
    assert rows == expected

    name = f"checkpoints/step-{END:08d}"
    tensors, expected_tensors = tensors_of(killed / name), tensors_of(whole / name)
    assert tensors.keys() == expected_tensors.keys() and len(tensors) > 20
    assert [key for key in tensors if not torch.equal(tensors[key], expected_tensors[key])] == []
    weights = [load_file(folder / name / "model" / "model.safetensors") for folder in (whole, killed)]
    assert [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])] == []


@pytest.mark.timeout(2400)
def test_every_step_read_the_rows_that_it_would_have_read(runs):
    """Also the steps that were done twice, or that nobody has heard of."""
    whole, killed, _, _ = runs
    for path in (whole / "logs").glob("rows-*.jsonl"):
        expected = {line["step"]: line["rows"] for line in map(json.loads, path.read_text().splitlines())}
        assert sorted(expected) == list(range(END))
        again = [json.loads(line) for line in (killed / "logs" / path.name).read_text().splitlines()]
        assert {line["step"] for line in again} == set(expected) and len(again) >= END
        assert [line for line in again if line["rows"] != expected[line["step"]]] == []


@pytest.mark.timeout(2400)
def test_mlflow_has_one_run_with_every_step_once(runs):
    whole, killed, _, _ = runs
    client = mlflow.MlflowClient(f"sqlite:///{whole.parent / 'mlflow.db'}")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, killed)]
    assert [(summary["status"], summary["steps"]) for summary in summaries] == [("done", END)] * 2
    ended = {"core": EDGE, "sums": OTHER_EDGE, "both": END}
    assert [summary["stages"] for summary in summaries] == [ended] * 2
    for summary in summaries:
        tags = client.get_run(summary["mlflow_run_id"]).data.tags
        assert tags["stage"] == "both" and tags["stage.2"] == f"sums, from step {EDGE + 1}"
    for metric in ("loss", "stage", "held_out_bits"):
        curves = [
            [(point.step, point.value) for point in client.get_metric_history(summary["mlflow_run_id"], metric)]
            for summary in summaries
        ]
        assert curves[0] == curves[1] and [step for step, _ in curves[0]] == list(range(1, END + 1)), metric


@pytest.mark.timeout(2400)
def test_the_terminal_says_where_stages_begin_and_end(runs):
    _, _, undisturbed, gone_on = runs
    begins = [
        f"stage    core, 1 of 3: steps 1 to {EDGE}",
        f"stage    sums, 2 of 3: steps {EDGE + 1} to {OTHER_EDGE}",
        f"stage    both, 3 of 3: steps {OTHER_EDGE + 1} to {END + 2} at most",
    ]
    assert [line for line in undisturbed.splitlines() if line.startswith("stage ")] == begins
    # The driver may have heard nothing of the second stage before that worker died.
    assert [line for line in gone_on.splitlines() if line.startswith("stage ")] in (begins[1:], begins[2:])
    assert f"going on from step-{OTHER_EDGE:08d}" in gone_on
    for out in (undisturbed, gone_on):
        assert f"stages   core to step {EDGE}, sums to step {OTHER_EDGE}, both to step {END} (ended early, " in out
        assert f"step    {END}/{END + 2}  both  loss" in out and "run.resume=true train.steps" not in out
