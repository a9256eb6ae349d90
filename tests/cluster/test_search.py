"""Ray Tune as this project uses it, for real, with trials that cost nothing: what is drawn, stopped, carried."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.search import Dimension, SearchSettings, run_search

STEPS = 6


class Listening:
    """Keeps what a search tells."""

    def __init__(self) -> None:
        self.drawn: dict[str, list[dict[str, Any]]] = {}
        self.reports: dict[str, list[dict[str, Any]]] = {}
        self.ends: dict[str, str | None] = {}

    def started(self, trial: str, drawn: dict[str, Any]) -> None:
        self.drawn.setdefault(trial, []).append(drawn)

    def reported(self, trial: str, report: dict[str, Any]) -> None:
        self.reports.setdefault(trial, []).append(report)

    def paused(self, trials: set[str]) -> None:
        assert trials <= {*self.drawn}

    def stopping(self) -> None:
        raise AssertionError("nobody has interrupted it")

    def ended(self, trial: str, drawn: dict[str, Any], error: str | None) -> None:
        assert trial not in self.ends
        self.ends[trial] = error

    def finished(self, trial: str) -> bool:
        return self.reports[trial][-1].get("status") == "done"


def settings(**changes: Any) -> SearchSettings:
    chosen = {
        "metric": "loss",
        "mode": "min",
        "search": "random",
        "scheduler": "none",
        "trials": 4,
        "concurrent": 4,
        "grace_period": 2,
        "reduction_factor": 2,
        "most_steps": STEPS,
        "seed": 0,
    }
    return SearchSettings(**{**chosen, **changes})


def make_work() -> Any:
    """A trial whose loss is (x - 3)² in all its steps. Made here, so that it travels by value."""

    def work(drawn: dict[str, Any], config: dict[str, Any], channel: Any) -> dict[str, Any]:
        started = 0 if channel.restored is None else channel.restored["step"]
        with open(config["log"], "a") as log:
            log.write(f"{os.getpid()} {started} {json.dumps(channel.restored)}\n")
        loss = (drawn["x"] - 3) ** 2
        folder = Path(config["log"]).parent
        while drawn["x"] > 5 and len([*folder.glob("log-*")]) < config.get("waits", 0):
            time.sleep(1.0)
        for step in range(started + 1, config["steps"] + 1):
            time.sleep(config.get("seconds", 0.02))
            if channel.stop.is_set():
                return {"status": "stopped"}
            channel.pointer = {"step": step, "x": drawn["x"]}
            channel.report({"step": step, "loss": loss})
            if step == 2 and "waits" in config:
                Path(f"{config['log']}-{drawn['x']}").touch()
        if config.get("fails"):
            raise ValueError("a trial's own mistake")
        return {"status": "done", "step": config["steps"], "loss": loss}

    return work


X = {"x": Dimension("uniform", 0.0, 10.0)}


def search(folder: Path, dimensions: dict[str, Dimension], listening: Listening, **changes: Any) -> Listening:
    config = {"log": str(folder / "log"), "steps": STEPS} | changes.pop("config", {})
    run_search(dimensions, settings(**changes), make_work(), config, folder / "ray", listening)
    return listening


def test_a_grid_is_every_combination_once(ray_session, tmp_path: Path) -> None:
    dimensions = {"x": Dimension("choice", options=(1, 2, 3)), "y": Dimension("choice", options=("a", "b"))}
    heard = search(tmp_path, dimensions, Listening(), search="grid", trials=6)
    points = sorted((drawn["x"], drawn["y"]) for (drawn,) in heard.drawn.values())
    assert points == [(x, y) for x in (1, 2, 3) for y in ("a", "b")]
    assert all(error is None and heard.finished(trial) for trial, error in heard.ends.items())


def test_the_seed_fixes_what_is_drawn_and_a_failure_is_one_trials_own(ray_session, tmp_path: Path) -> None:
    whole = {
        "x": Dimension("uniform", 0.0, 10.0),
        "n": Dimension("randint", 1, 2),
        "q": Dimension("quniform", 0, 1, 0.5),
    }
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        heard = search(tmp_path / name, whole, Listening(), config={"fails": True, "steps": 1})
        found.append(sorted((drawn for (drawn,) in heard.drawn.values()), key=lambda drawn: drawn["x"]))
        last = [reports[-1] for reports in heard.reports.values()]
        assert [each["error"] for each in last] == ["ValueError: a trial's own mistake"] * 4
    assert found[0] == found[1]
    assert {drawn["n"] for drawn in found[0]} == {1, 2}  # both ends belong to it
    assert {drawn["q"] for drawn in found[0]} <= {0.0, 0.5, 1.0}


def test_optuna_looks_where_it_is_good(ray_session, tmp_path: Path) -> None:
    heard = search(
        tmp_path, X, Listening(), search="optuna", trials=20, concurrent=2, config={"steps": 1, "seconds": 0}
    )
    drawn = [drawn["x"] for (drawn,) in heard.drawn.values()]
    assert len(drawn) == 20
    early, late = ([abs(x - 3) for x in part] for part in (drawn[:6], drawn[-8:]))
    assert sorted(late)[4] < sorted(early)[3] and min(late) < 1


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_what_is_behind_is_stopped(ray_session, tmp_path: Path, scheduler: str) -> None:
    """The bad one reports only when the three others have."""
    dimensions = {"x": Dimension("choice", options=(3, 3.5, 4, 9))}
    heard = search(
        tmp_path, dimensions, Listening(), search="grid", scheduler=scheduler, config={"seconds": 0.3, "waits": 3}
    )
    ended = {heard.drawn[trial][0]["x"]: heard.finished(trial) for trial in heard.ends}
    assert ended[3] and not ended[9]
    assert set(heard.ends.values()) == {None}
    (last,) = [reports[-1]["step"] for trial, reports in heard.reports.items() if heard.drawn[trial][0]["x"] == 9]
    assert last < STEPS


def test_a_population_carries_pointers_from_the_good_to_the_bad(ray_session, tmp_path: Path) -> None:
    dimensions = {"x": Dimension("uniform", 0.0, 10.0)}
    heard = search(tmp_path, dimensions, Listening(), scheduler="pbt", trials=4, config={"steps": 12, "seconds": 0.2})
    assert [*heard.ends.values()] == [None] * 4 and all(heard.finished(trial) for trial in heard.ends)
    changed = {trial: drawn for trial, drawn in heard.drawn.items() if len({each["x"] for each in drawn}) > 1}
    assert changed, "nobody was taken over"
    assert all(0 <= each["x"] <= 10 for drawn in heard.drawn.values() for each in drawn)
    begun = [line.split(" ", 2) for line in (tmp_path / "log").read_text().splitlines()]
    pointers = [json.loads(pointer) for _, _, pointer in begun if pointer != "null"]
    assert pointers and all(pointer["step"] % 2 == 0 for pointer in pointers)
    firsts = {trial: drawn[0]["x"] for trial, drawn in heard.drawn.items()}
    for trial in changed:  # what it was given is a donor's, and the donor was ahead
        others = [x for name, x in firsts.items() if name != trial]
        assert any(pointer["x"] in others for pointer in pointers)


def test_a_trial_whose_process_dies_runs_again(ray_session, tmp_path: Path) -> None:
    class Killing(Listening):
        killed = 0

        def reported(self, trial: str, report: dict[str, Any]) -> None:
            super().reported(trial, report)
            if report["step"] == 2 and not self.killed:
                self.killed = int((tmp_path / "log").read_text().split()[0])
                os.kill(self.killed, signal.SIGKILL)

    heard = search(tmp_path, X, Killing(), trials=1, config={"seconds": 0.3})
    (trial,) = heard.ends
    pids = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(pids) == 2 and heard.killed == int(pids[0]) and heard.ends[trial] is None and heard.finished(trial)
