"""How many trials run at a time, and how ``mmada plan`` says so."""

from __future__ import annotations

import threading
import time

import pytest
import ray

from cluster.session import RaySession
from jobs import cli
from jobs.recipe import RecipeError, load_recipe, load_values
from jobs.recipe_checks_tune import check_tune
from jobs.shrinking import training_for
from jobs.tuning import room
from jobs.tuning.room import trials_at_once, wait_for_room


def node(cpu: float, gpu: float = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpu, "GPU": gpu}}


def at_once(nodes: list[dict] | None, *overrides: str) -> int:
    return trials_at_once(check_tune(load_values("tune-debug", ["tune.max_concurrent=null", *overrides])), nodes)


def test_workers_find_a_place_on_nodes() -> None:
    assert at_once([node(1), node(1), node(1, alive=False)]) == 2
    assert at_once([node(3), node(3)], "cluster.workers=2", "cluster.cpus_per_worker=2") == 1
    assert at_once([node(64)]) == 4  # all there are
    assert at_once([node(64, 3)], "cluster.gpus_per_worker=1", "cluster.address=head:6379") == 3
    assert at_once([node(64)], "tune.max_concurrent=2") == 2
    assert at_once([]) == 1  # which waits for its machines


def test_more_than_there_is_room_for_is_refused_on_a_cluster_and_shared_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"^tune\.max_concurrent=3 trials .* has room for 2; use tune\.max_conc"):
        at_once([node(2)], "tune.max_concurrent=3")
    monkeypatch.setattr(room.os, "cpu_count", lambda: 4)
    assert at_once(None) == 4
    assert at_once(None, "cluster.workers=2", "train.global_batch=8") == 2
    assert at_once(None, "cluster.threads_per_worker=3") == 1
    assert at_once(None, "tune.max_concurrent=3", "cluster.threads_per_worker=4") == 3


def test_the_plan_of_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(["plan", "tune-debug"])
    assert exited.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "search 4 trials (random, asha), 2 at a time, of at most 24 steps each looking for the least bits" in said
    assert "CPUs 2 " in said  # of both trials
    with pytest.raises(SystemExit) as exited:
        cli.main(["plan", "tune-debug", "tune.grace_period=24"])
    assert exited.value.code == 2
    assert "tune.grace_period=24 is as long as the longest trial" in capsys.readouterr().err


def test_a_trial_waits_for_its_places_and_takes_fewer_when_they_will_not_come(tmp_path) -> None:
    def trial(workers: int, **keys: object) -> int:
        wanted = {"workers": workers, "expert_parallel": 1, "max_failures": 1, "node_timeout": 1.0} | keys
        overrides = [f"cluster.{key}={value}" for key, value in wanted.items()]
        return wait_for_room(load_recipe("debug", [*overrides, "train.global_batch=24"]), training_for, stop)

    stop = threading.Event()
    with RaySession(None, workers=4, cpus_per_worker=1, gpus_per_worker=0, log_dir=tmp_path):
        there = int(ray.cluster_resources()["CPU"])
        assert there == 5 and trial(4) == 4
        # A node was lost: of six workers five have places, which do not divide the batch, and four do.
        assert trial(6, min_workers=1) == 4
        assert trial(6) == 6 and trial(8, min_workers=6) == 8  # what the session then refuses

        @ray.remote(num_cpus=3)
        class Holder:
            def ready(self) -> None:
                pass

        holder = Holder.remote()
        ray.get(holder.ready.remote(), timeout=60)
        threading.Timer(3.0, ray.kill, (holder,)).start()
        began = time.monotonic()
        assert trial(4, min_workers=1) == 4  # another trial's places are waited for, longer than for a lost node
        assert time.monotonic() - began >= 2.5
        stop.set()
        assert trial(6, node_timeout=600) == 6
