"""A real MLflow server with a database behind it that is killed, slow, or deaf in the middle of a run."""

import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.tracking import Tracker
from cluster.tracking_buffer import BUFFER, write_json
from cluster.tracking_client import experiment_id
from tests.cluster.mlflow_server import client, free_port, points, running_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")  # seconds; what the user has set holds


def table_rows(uri: str, run_id: str) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        table = json.loads(Path(client(uri).download_artifacts(run_id, "tables/samples.json", folder)).read_text())
    return [row[table["columns"].index("n")] for row in table["data"]]


def runs_of(uri: str, experiment: str) -> list[str]:
    found = client(uri).get_experiment_by_name(experiment)
    return [run.info.run_id for run in client(uri).search_runs([found.experiment_id])]


def send(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "jobs.cli", "send", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    return done.returncode, done.stdout, done.stderr


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_killed_in_the_middle_and_started_again_misses_nothing(tmp_path, server):
    tracker = Tracker(server.uri, "killed", tmp_path / "run", "run", system_metrics_seconds=0.2)
    run_id = tracker.start({"train": {"steps": 900}})
    for step in range(900):
        tracker.log(step, {"loss": step / 7, "grad_norm": 1.0})
        if step % 100 == 0:
            tracker.table("samples", [{"n": step}, {"n": step + 1}])
            tracker.tag({"stage": step})
        if step == 300:
            server.kill()
        if step == 600:
            server.start()
        time.sleep(0.003)
    assert tracker.finish("done", timeout_s=60) == []
    for metric, value in (("loss", lambda step: step / 7), ("grad_norm", lambda step: 1.0)):
        assert points(server.uri, run_id, metric) == [(step, value(step)) for step in range(900)]
    steps = [step for step, _ in points(server.uri, run_id, "system/cpu_utilization_percentage")]
    assert steps == list(range(len(steps)))
    assert table_rows(server.uri, run_id) == [n for step in range(0, 900, 100) for n in (step, step + 1)]
    run = client(server.uri).get_run(run_id)
    assert (run.info.status, run.data.tags["stage"]) == ("FINISHED", "800")
    assert runs_of(server.uri, "killed") == [run_id]


RECORD = """
import sys, time
from pathlib import Path
from cluster.tracking import Tracker
tracker = Tracker(sys.argv[1], "both", Path(sys.argv[2]), "run", system_metrics_seconds=60)
print(tracker.start({"train": {"steps": 20}}), flush=True)
for step in range(20):
    tracker.log(step, {"loss": float(step)})
input()
for step in range(20, 40):
    tracker.log(step, {"loss": float(step)})
tracker.table("samples", [{"n": 1}, {"n": 2}])
print("said", flush=True)
time.sleep(300)
"""


def test_run_and_server_are_killed_and_the_run_goes_on_alone(tmp_path, server):
    folder, pipe = tmp_path / "run", subprocess.PIPE
    command = [sys.executable, "-c", RECORD, server.uri, str(folder)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as first:
        run_id = first.stdout.readline().strip()
        wait_for(lambda: len(points(server.uri, run_id, "loss")) == 20)
        server.kill()
        print(file=first.stdin, flush=True)
        assert first.stdout.readline() == "said\n"
        first.kill()

    with pytest.raises(ClusterError, match="does not answer"):  # a run that is new, and an address that is
        Tracker(server.uri, "both", tmp_path / "another", "run")
    with pytest.raises(ClusterError, match="does not answer"):
        Tracker(f"http://127.0.0.1:{free_port()}", "both", folder, "run", run_id=run_id)
    second = Tracker(server.uri, "both", folder, "run", run_id=run_id, system_metrics_seconds=60)
    assert second.waits_because == f"tracking.uri={server.uri} does not answer"
    assert second.start({"train": {"steps": 60}}) == run_id
    assert second.steps_of("loss") == set(range(40))
    for step in range(40, 60):
        second.log(step, {"loss": float(step)})
    second.table("samples", [{"n": 3}])
    (line,) = second.finish("done", timeout_s=1)
    assert line.endswith(
        "of steps 0 to 59, the parameters, rows of tables/samples.json, the status FINISHED; "
        f"send them later with mmada send {folder}"
    )
    code, out, err = send(str(folder))
    assert (code, out) == (2, "")
    assert err == (
        f"mmada: tracking.uri={server.uri} does not answer; start it with 'mlflow server --port {server.port}' or "
        "leave tracking.uri empty to use a file here\n"
    )

    server.start()
    code, out, err = send(str(folder))
    assert (code, err) == (0, "")
    assert out.startswith(f"sent to {server.uri}: ")
    assert out.endswith("of steps 0 to 59, the parameters, rows of tables/samples.json, the status FINISHED\n")
    assert send(str(folder))[:2] == (0, f"nothing is left to send: {server.uri} has all of {folder}\n")
    assert points(server.uri, run_id, "loss") == [(step, float(step)) for step in range(60)]
    assert table_rows(server.uri, run_id) == [1, 2, 3]
    run = client(server.uri).get_run(run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"train.steps": "20"})
    assert run.data.tags["resumed.train.steps"] == "60"
    assert runs_of(server.uri, "both") == [run_id]


class Proxy:
    """In front of a server: passes on, holds everything back for a while, or loses the answers."""

    def __init__(self, port: int):
        self.target, self.delay, self.is_deaf = port, 0.0, False
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inside, _ = self.listener.accept()
            except OSError:
                return
            outside = socket.create_connection(("127.0.0.1", self.target))
            self.sockets += [inside, outside]
            threading.Thread(target=self._pass_on, args=(inside, outside, False), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(outside, inside, True), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                time.sleep(self.delay)
                if not (is_answer and self.is_deaf):
                    target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:  # one side has gone
            return


@contextmanager
def proxy_of(server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    try:
        yield proxy
    finally:
        for each in (proxy.listener, *proxy.sockets):
            each.close()


def test_what_arrived_unheard_is_not_doubled(tmp_path, server):
    with proxy_of(server) as proxy:
        tracker = Tracker(proxy.uri, "deaf", tmp_path / "run", "run", system_metrics_seconds=60)
        run_id = tracker.start({})
        proxy.is_deaf = True
        for step in range(50):
            tracker.log(step, {"loss": float(step)})
        tracker.table("samples", [{"n": 1}, {"n": 2}])
        wait_for(lambda: len(points(server.uri, run_id, "loss")) == 50)
        proxy.is_deaf = False
        tracker.table("samples", [{"n": 3}])
        assert tracker.finish("done", timeout_s=60) == []
    assert points(server.uri, run_id, "loss") == [(step, float(step)) for step in range(50)]
    assert table_rows(server.uri, run_id) == [1, 2, 3]


def test_a_slow_server_slows_nobody_and_another_address_serves(tmp_path, server):
    with proxy_of(server) as proxy:
        tracker = Tracker(proxy.uri, "slow", tmp_path / "run", "run", system_metrics_seconds=60)
        run_id = tracker.start({})
        proxy.delay = 20.0
        began = time.monotonic()
        for step in range(1000):
            tracker.log(step, {"loss": float(step)})
            tracker.tag({"step": step})
        assert time.monotonic() - began < proxy.delay / 2  # two thousand entries in less than half of one request
        (line,) = tracker.finish("done", timeout_s=1)
    assert "of steps 0 to 999, 1 tag, the status FINISHED; " in line
    code, out, err = send(str(tmp_path / "run"), "--uri", server.uri)
    assert (code, err) == (0, "")
    assert points(server.uri, run_id, "loss") == [(step, float(step)) for step in range(1000)]
    assert client(server.uri).get_run(run_id).data.tags["step"] == "999"


def test_a_start_that_was_killed_made_the_run_that_goes_on(tmp_path, server):
    folder = tmp_path / "run"
    (folder / BUFFER).mkdir(parents=True)
    write_json(folder / BUFFER / "state.json", {"creating": 1_700_000_000_000, "whole": True, "opened": 1})
    experiment = experiment_id(client(server.uri), server.uri, "twice")
    for where in (tmp_path / "other", folder):  # another run may have begun at that moment
        made = client(server.uri).create_run(experiment, 1_700_000_000_000, {"run.dir": str(where)}, "run")
    tracker = Tracker(server.uri, "twice", folder, "run", system_metrics_seconds=60)
    assert tracker.start({"a": 1}) == made.info.run_id
    assert tracker.finish("done") == []
    assert len(runs_of(server.uri, "twice")) == 2
    new = Tracker(server.uri, "twice", folder, "run", system_metrics_seconds=60)  # no run_id: wanted as a new one
    assert new.start({"a": 1}) not in (made.info.run_id, None)
    assert new.finish("done") == []


def test_a_folder_that_is_no_run(tmp_path):
    assert send(str(tmp_path)) == (
        2,
        "",
        f"mmada: RUN_DIR={tmp_path} holds nothing for MLflow; give the folder of a run, such as runs/NAME\n",
    )
