"""A cluster of several nodes, one of which is lost in the middle of a run: ``mmada train`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from jobs.progress import read_metrics
from jobs.recipe import Recipe, load_recipe
from tests.cluster.machines import Machines
from tests.jobs.test_train import MMADA, finish, processes_of, sealed, wait_for
from tests.jobs.workers import bare_curve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, SAVED = 8, 2
LEFT = """
import json, sys, ray
from ray._private.state import actors
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
groups = [group["state"] for group in ray.util.placement_group_table().values()]
print(json.dumps([[[actor["ActorClassName"], actor["State"]] for actor in actors().values()], groups]))
"""


def overrides(folder: Path, machines: Machines) -> list[str]:
    """Two workers with ZeRO 2, the experts split over both, and a checkpoint every other step: time enough to strike.

    Workers balance each row for itself, as then the number of rows in a pass does not matter.
    """
    keys: dict[str, Any] = {"run.dir": folder, "run.name": "lost", "cluster.address": machines.address}
    keys |= {"cluster.min_workers": 1, "cluster.node_timeout": 2, "cluster.threads_per_worker": 1}
    keys |= {"data.limit_documents": 40, "model.router_balance_scope": "sequence"}
    keys |= {"train.steps": STEPS, "train.checkpoint_every": 2, "train.evaluate_every": 0}
    return [f"{key}={value}" for key, value in keys.items()]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with Machines(2, cpus=1) as running:
        yield running


@pytest.fixture(scope="module")
def run(machines, tmp_path_factory) -> tuple[Recipe, Path, str, str]:
    """The recipe, its run's folder, what it said, and the address of the node that was killed: rank 0's."""
    folder = tmp_path_factory.mktemp("nodes")
    keys = overrides(folder, machines)
    process = subprocess.Popen(
        [*machines.within, *MMADA, "train", "debug", *keys],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=machines.environment,
    )
    run_dir = folder / "lost"
    try:
        wait_for(sealed(run_dir, SAVED), process, "checkpoint")
        workers = json.loads((run_dir / "workers.json").read_text())
        nodes = [next(node for node in machines.nodes if node.holds(worker["pid"])) for worker in workers]
        assert nodes[0] is not nodes[1]
        nodes[0].kill()
        code, out, err = finish(process)
    finally:
        process.kill()
    assert (code, err) == (0, ""), out + err
    return load_recipe("debug", keys), run_dir, out, nodes[0].address


def test_the_terminal_says_what_was_lost_and_what_follows(run):
    _, _, out, lost = run
    lines = [line for line in out.splitlines() if "step  " not in line]
    said = lines[lines.index(f"node {lost} lost") :]
    assert said[:4] == [
        f"node {lost} lost",
        "there is room for 1 of 2 workers; waiting up to 2 s for another node",
        "going on with 1 worker instead of 2",
        "starting 1 worker …",
    ]
    assert said[4].startswith("converted step-") and said[4].endswith("workers 2 to 1, expert_parallel 2 to 1")
    assert f"going on from {said[4].split()[1]}" == said[5] and said[6].startswith("done ")


def test_the_curve_is_that_of_a_plain_loop(run, prepared):
    recipe, run_dir, _, _ = run
    rows = read_metrics(run_dir, up_to=STEPS)
    expected, _ = bare_curve(recipe, prepared, STEPS)
    found = [(row["loss"], row["gradient_norm"]) for row in rows]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert found == [pytest.approx(pair, rel=1e-4) for pair in expected]


def test_every_step_read_its_rows_once(run):
    """Steps that were done twice read the same rows: those of the later time, of two workers or of one, are whole."""
    recipe, run_dir, _, _ = run
    read: dict[int, list[list[int]]] = {}
    for path in sorted((run_dir / "logs").glob("rows-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            read.setdefault(line["step"], []).append(line["rows"])
    assert sorted(read) == list(range(STEPS))
    size, shares = recipe.train.global_batch, []
    for parts in read.values():
        whole = [part for part in parts if len(part) == size]
        halves = [row for part in parts if len(part) < size for row in part]
        assert all(sorted(part) == sorted(whole[0]) for part in whole)
        assert not (whole and halves) or set(halves) <= set(whole[0])
        shares.append(len(whole))
    assert shares[:SAVED] == [0] * SAVED and shares[-1] == 1  # two workers, then one


def test_summary_and_mlflow_know_of_it(run):
    _, run_dir, _, lost = run
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [summary[key] for key in ("status", "steps", "workers", "restarts")] == ["done", STEPS, 1, 1]
    client = mlflow.MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    tags = client.get_run(summary["mlflow_run_id"]).data.tags
    assert (tags["workers"], tags["restarts"]) == ("1", "1")
    assert tags["restart.1"] == f"node {lost} lost; going on with 1 worker instead of 2"
    losses = client.get_metric_history(summary["mlflow_run_id"], "loss")
    assert [point.step for point in losses] == list(range(1, STEPS + 1))


def test_nothing_is_left_on_the_cluster(run, machines):
    assert processes_of(run[1]) == []
    command = [*machines.within, sys.executable, "-c", LEFT, machines.address]
    environment = {**machines.environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert said.returncode == 0, said.stderr
    actors, groups = json.loads(said.stdout.splitlines()[-1])
    # Ray keeps one of its own for the whole cluster, whoever trains on it.
    alive = [name for name, state in actors if state != "DEAD" and name != "_AutoscalingCoordinatorActor"]
    assert alive == [] and len(actors) >= 5  # controllers and workers of both attempts
    assert set(groups) == {"REMOVED"}
