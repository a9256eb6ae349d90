"""Runs recorded in a real MLflow server and in the file used by default, and read back through MLflow's client."""

import http.server
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from cluster import tracking_uri
from cluster.errors import ClusterError
from cluster.tracking import Tracker, check_uri, flatten
from tests.cluster.mlflow_server import client, free_port, points, running_server


def a_figure() -> Figure:
    figure = Figure()
    figure.subplots().plot([3.0, 2.0, 1.5])
    return figure


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")  # seconds; what the user has set holds


PARAMS = {"run": {"name": "first", "seed": 1}, "train": {"steps": 20, "betas": [0.9, 0.95], "offload": None}, "x": {}}


def record_and_continue(uri: str | None, run_dir: Path) -> tuple[str, str, list[str]]:
    """A run of three steps, continued for two more with another number of steps: (address, run id, artifacts)."""
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "logs" / "run.log").write_text("all is well")
    tracker = Tracker(uri, "an experiment", run_dir, "first", system_metrics_seconds=0.2)
    run_id = tracker.start(PARAMS)
    assert client(tracker.uri).get_run(run_id).info.status == "RUNNING"
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 4 / step, "bits_per_byte": 8 / step})
    tracker.figure("learning_curve", a_figure())
    tracker.artifact(run_dir / "logs")
    tracker.checkpoint(run_dir / "checkpoints" / "step-00000003", 3, 4096)
    tracker.tag({"model.patches.threshold": 1.25})
    time.sleep(0.5)
    assert tracker.finish("failed") == []
    assert client(tracker.uri).get_run(run_id).info.status == "FAILED"

    again = Tracker(uri, "an experiment", run_dir, "first", run_id=run_id, system_metrics_seconds=0.2)
    assert again.start({**PARAMS, "train": {**PARAMS["train"], "steps": 40}, "added": True}) == run_id
    assert client(tracker.uri).get_run(run_id).info.status == "RUNNING"
    for step in (4, 5):
        again.log(step, {"loss": 4 / step})
    assert again.finish("done") == []
    assert again.finish("done") == []
    found = client(tracker.uri).list_artifacts
    return tracker.uri, run_id, [item.path for folder in ("figures", "logs") for item in found(run_id, folder)]


def check_recorded(uri: str, run_id: str, artifacts: list[str], run_dir: Path) -> None:
    run = client(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params == {
        "run.name": "first",
        "run.seed": "1",
        "train.steps": "20",
        "train.betas": "[0.9, 0.95]",
        "train.offload": "None",
        "x": "{}",
        "added": "True",
    }
    ours = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
    assert ours == {
        "run.dir": str(run_dir),
        "resumed.train.steps": "40",
        "checkpoint.path": str(run_dir / "checkpoints" / "step-00000003"),
        "checkpoint.step": "3",
        "checkpoint.bytes": "4096",
        "model.patches.threshold": "1.25",
    }
    assert points(uri, run_id, "loss") == [(1, 4.0), (2, 2.0), (3, 4 / 3), (4, 1.0), (5, 0.8)]
    assert points(uri, run_id, "bits_per_byte") == [(1, 8.0), (2, 4.0), (3, 8 / 3)]
    memory = points(uri, run_id, "system/system_memory_usage_percentage")
    assert len(memory) >= 3  # two at least from the first half second, one from the continuation
    assert [step for step, _ in memory] == list(range(len(memory)))
    assert all(0 < value < 100 for _, value in memory)
    assert artifacts == ["figures/learning_curve.png", "logs/run.log"]
    picture = Path(client(uri).download_artifacts(run_id, "figures/learning_curve.png")).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    experiments = [found.name for found in client(uri).search_experiments()]
    assert experiments.count("an experiment") == 1
    assert len(client(uri).search_runs([run.info.experiment_id])) == 1


def test_a_file_beside_the_runs_by_default(tmp_path, capfd):
    run_dir = tmp_path / "runs" / "first"
    uri, run_id, artifacts = record_and_continue(None, run_dir)
    assert capfd.readouterr() == ("", "")
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    check_recorded(uri, run_id, artifacts, run_dir)
    stored = tmp_path / "runs" / "mlartifacts" / run_id / "artifacts" / "figures" / "learning_curve.png"
    assert stored.is_file()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name == "mlruns") == []


def test_a_server(tmp_path, server, capfd):
    uri, run_id, artifacts = record_and_continue(server.uri, tmp_path / "first")
    assert capfd.readouterr() == ("", "")
    check_recorded(uri, run_id, artifacts, tmp_path / "first")


def test_more_than_mlflow_takes_at_once(tmp_path, server):
    params = {f"p{number:03}": number for number in range(250)}
    tracker = Tracker(server.uri, "limits", tmp_path / "run", "many")
    run_id = tracker.start({**params, "long": "x" * 7000})
    tracker.log(0, {f"expert_{number}": number for number in range(2500)})
    for step in range(1, 3001):
        tracker.log(step, {"loss": float(step)})
    tracker.log(3001, {})
    assert tracker.finish("done") == []
    run = client(server.uri).get_run(run_id)
    assert len(run.data.params) == 251
    assert run.data.params["p249"] == "249"
    assert run.data.params["long"] == "x" * 6000
    assert len([name for name in run.data.metrics if name.startswith("expert_")]) == 2500
    assert points(server.uri, run_id, "loss") == [(step, float(step)) for step in range(1, 3001)]


def test_one_refused_thing_takes_no_other_along(tmp_path, server):
    tracker = Tracker(server.uri, "refusals", tmp_path / "run", "names")
    run_id = tracker.start({})
    for step in range(5):
        tracker.log(step, {"what?" if step == 3 else "loss": 1.0})
    tracker.artifact(tmp_path / "gone.json")
    tracker.checkpoint(tmp_path / "step-00000004", 4, 1)
    lost = tracker.finish("done")
    assert [line.split(":")[0] for line in lost] == ["metrics of step 3", f"artifact {tmp_path / 'gone.json'}"]
    assert "what?" in lost[0]
    assert [step for step, _ in points(server.uri, run_id, "loss")] == [0, 1, 2, 4]
    run = client(server.uri).get_run(run_id)
    assert (run.info.status, run.data.tags["checkpoint.step"]) == ("FINISHED", "4")


def test_a_server_that_hangs_for_a_while_costs_the_run_nothing(tmp_path, server, impatient):
    tracker = Tracker(server.uri, "hanging", tmp_path / "run", "patient", system_metrics_seconds=0.2)
    run_id = tracker.start({})
    server.send(signal.SIGSTOP)
    try:
        started = time.monotonic()
        for step in range(2000):
            tracker.log(step, {"loss": float(step)})
        assert time.monotonic() - started < 1
        time.sleep(4)  # longer than a request may take: it has failed by now
    finally:
        server.send(signal.SIGCONT)
    assert tracker.finish("done") == []
    assert points(server.uri, run_id, "loss") == [(step, float(step)) for step in range(2000)]
    assert client(server.uri).get_run(run_id).info.status == "FINISHED"


def test_a_server_that_is_gone_at_the_end_is_said_in_bounded_time(tmp_path, server, impatient):
    tracker = Tracker(server.uri, "gone", tmp_path / "run", "bounded", system_metrics_seconds=60)
    run_id = tracker.start({})
    server.send(signal.SIGSTOP)
    try:
        for step in range(10, 15):
            tracker.log(step, {"loss": 1.0, "grad_norm": 2.0})
        tracker.figure("learning_curve", a_figure())
        started = time.monotonic()
        lost = tracker.finish("failed", timeout_s=3)
        assert 3 <= time.monotonic() - started < 5
    finally:
        server.send(signal.SIGCONT)
    left = r"(\d+) metrics of steps 0 to 14, figure learning_curve, the status FAILED"
    told = re.fullmatch(
        rf"not in MLflow within 3 s(?: \(the server does not answer\))?: {left}; "
        f"send them later with mmada send {tmp_path}/run",
        *lost,
    )
    assert int(told[1]) > 10  # ten of ours, and one sample of the system's at step 0
    again = Tracker(server.uri, "gone", tmp_path / "run", "bounded", run_id=run_id)
    assert again.start({}) == run_id
    assert again.finish("done") == []
    assert points(server.uri, run_id, "grad_norm") == [(step, 2.0) for step in range(10, 15)]


def test_two_runs_may_start_one_experiment_together(tmp_path, server):
    trackers = [Tracker(server.uri, "together", tmp_path / str(i), f"run {i}") for i in range(4)]
    with ThreadPoolExecutor(len(trackers)) as pool:
        started = list(pool.map(lambda tracker: tracker.start({}), trackers, timeout=60))
    assert [tracker.finish("done") for tracker in trackers] == [[]] * 4
    experiment = client(server.uri).get_experiment_by_name("together")
    found = client(server.uri).search_runs([experiment.experiment_id])
    assert sorted(run.info.run_id for run in found) == sorted(started)


def test_a_run_that_is_not_there_cannot_be_continued(tmp_path, server):
    tracker = Tracker(server.uri, "an experiment", tmp_path / "run", "lost", run_id="0" * 32)
    with pytest.raises(ClusterError) as error:
        tracker.start({})
    assert str(error.value) == (
        f"tracking.uri={server.uri} refuses the run in tracking.experiment=an experiment (RESOURCE_DOES_NOT_EXIST: "
        f"Run with id={'0' * 32} not found); give the tracking.uri that the run was started with, start a new one "
        "under another run.name, or leave tracking.uri empty to use a file here"
    )
    assert tracker.finish("failed") == []
    with pytest.raises(ValueError, match="metrics of step 1 was given to a tracker that is not started"):
        tracker.log(1, {"loss": 1.0})


def test_a_deleted_experiment_is_named(tmp_path, server):
    experiment_id = client(server.uri).create_experiment("deleted")
    client(server.uri).delete_experiment(experiment_id)
    with pytest.raises(ClusterError, match="in tracking.experiment=deleted .*; use another tracking.experiment"):
        Tracker(server.uri, "deleted", tmp_path / "run", "lost").start({})


def test_nobody_at_the_address(tmp_path):
    port = free_port()
    with pytest.raises(ClusterError) as error:
        Tracker(f"http://127.0.0.1:{port}", "e", tmp_path / "run", "r")
    assert str(error.value) == (
        f"tracking.uri=http://127.0.0.1:{port} does not answer; start it with 'mlflow server --port {port}' or leave "
        "tracking.uri empty to use a file here"
    )


def test_a_listener_that_says_nothing_does_not_hang(monkeypatch):
    monkeypatch.setattr(tracking_uri, "PREFLIGHT_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started = time.monotonic()
        with pytest.raises(ClusterError, match="does not answer; start it with 'mlflow server --port"):
            check_uri(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert time.monotonic() - started < 4


def test_a_server_of_another_kind():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        serving = threading.Thread(target=other.serve_forever, daemon=True)
        serving.start()
        try:
            with pytest.raises(ClusterError, match=r"answers, but not as an MLflow server \(HTTP 501\); start it with"):
                check_uri(f"http://127.0.0.1:{other.server_port}")
        finally:
            other.shutdown()


@pytest.mark.parametrize(
    "uri",
    [
        "127.0.0.1:5000",
        "5000",
        "http://",
        "http://:5000",
        "http://a b",
        "http://host:port",
        "ftp://h",
        "/tmp/x",
        "sqlite:///",
    ],
)
def test_what_is_no_place_for_runs(uri):
    with pytest.raises(ClusterError) as error:
        check_uri(uri)
    assert str(error.value) == (
        f"tracking.uri={uri} is no place that runs can be recorded in; use http://host:port, sqlite:///file.db, or "
        "leave tracking.uri empty to use a file here"
    )


def test_files_that_cannot_hold_runs(tmp_path):
    text = tmp_path / "notes.db"
    text.write_text("these are my notes, not a database")
    for path, wrong in (
        (text, "is a file of another kind"),
        (tmp_path, "is not a file"),
        (text / "mlflow.db", f"cannot be written: {text} does not allow it"),
    ):
        with pytest.raises(ClusterError) as error:
            check_uri(f"sqlite:///{path}")
        assert str(error.value).startswith(f"tracking.uri=sqlite:///{path} {wrong}; name another file")
    check_uri(f"sqlite:///{tmp_path}/new/folder/mlflow.db")
    assert not (tmp_path / "new").exists()


def test_no_password_in_an_error():
    port = free_port()
    with pytest.raises(ClusterError) as error:
        check_uri(f"http://ann:secret@127.0.0.1:{port}")
    assert f"tracking.uri=http://ann:…@127.0.0.1:{port} does not answer" in str(error.value)
    assert "secret" not in str(error.value)


def test_params_are_flattened_with_dots():
    assert flatten({"a": {"b": {"c": 1}, "d": [1, {"e": None}]}, "f": {}, "g": None, "h": True, "i": "x" * 6001}) == {
        "a.b.c": "1",
        "a.d": '[1, {"e": null}]',
        "f": "{}",
        "g": "None",
        "h": "True",
        "i": "x" * 6000,
    }


def test_nothing_heavy_is_imported_with_the_module():
    script = "import sys, cluster.tracking; print(sorted({'mlflow', 'torch', 'ray', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n"
