"""How many trials run at a time, and how ``mmada plan`` says so."""

from __future__ import annotations

import pytest

from jobs import cli
from jobs.recipe import RecipeError, load_values
from jobs.recipe_checks_tune import check_tune
from jobs.tuning import room
from jobs.tuning.room import trials_at_once


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
