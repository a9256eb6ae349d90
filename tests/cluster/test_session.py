"""Ray started and joined for real; each driver is a process of its own, found again by a mark in its environment."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from cluster.errors import ClusterError
from cluster.session import RaySession

REPOSITORY = Path(__file__).parents[2]
MARK = "SESSION_TEST_MARK"

PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
import psutil, ray
from cluster.errors import ClusterError
from cluster.session import RaySession
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
folder = Path(sys.argv[1])

@ray.remote
def leave_a_child():
    import subprocess
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid

@ray.remote
def sleep(seconds):
    time.sleep(seconds)
"""


class Driver:
    """A Python process that imports the session and is known by its mark, as is everything that it starts."""

    def __init__(self, script: str, folder: Path, **environment: str):
        self.mark = uuid.uuid4().hex
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script, str(folder)],
            cwd=REPOSITORY,
            env={**inherited, **environment, MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        # No wait in these tests is without an end: readline gives "" once the process is gone.
        self.watchdog = threading.Timer(120, self.process.kill)
        self.watchdog.start()

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def finish(self, timeout: float = 60) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
            self.watchdog.cancel()
        return self.process.returncode, out, err

    def remaining(self, wait_s: float = 0) -> list[str]:
        return processes_with(self.mark, wait_s)


def processes_with(mark: str, wait_s: float = 0) -> list[str]:
    """Command lines of the processes whose environment holds the mark, once none is left or the time is over."""
    deadline = time.monotonic() + wait_s
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == mark:
                    found.append(" ".join(process.cmdline())[:120] or process.name())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def test_a_local_session_ends_with_all_its_processes_even_after_an_exception(tmp_path):
    driver = Driver(
        """
before = dict(os.environ)
try:
    with RaySession(
        None, os.cpu_count() + 1, cpus_per_worker=1, gpus_per_worker=0, log_dir=folder, extra_cpus=1.5
    ) as session:
        cpus = ray.cluster_resources()["CPU"]
        left_behind = ray.get(leave_a_child.remote(), timeout=60)
        link = folder / "ray-logs"
        logs = link.is_symlink() and any(link.glob("raylet*"))
        raise ZeroDivisionError
except ZeroDivisionError:
    pass
print(json.dumps({
    "cpus": cpus,
    "logs": logs,
    "children": [p.name() for p in psutil.Process().children(recursive=True)],
    "left_behind": psutil.pid_exists(left_behind),
    "initialized": ray.is_initialized(),
    "environment": dict(os.environ) == before,
    "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
}))
""",
        tmp_path,
    )
    code, out, err = driver.finish()
    assert code == 0, err
    assert json.loads(out) == {
        "cpus": os.cpu_count() + 4,  # a worker more than there are CPUs, 1.5 for others, and one for the controller
        "logs": True,
        "children": [],
        "left_behind": False,
        "initialized": False,
        "environment": True,
        "sigterm": True,
    }
    assert driver.remaining() == []
    assert err == ""


def test_a_signal_leaves_no_process(tmp_path):
    script = """
print("starting", flush=True)
with RaySession(None, workers=1, cpus_per_worker=1, gpus_per_worker=0, log_dir=folder):
    ray.get(leave_a_child.remote(), timeout=60)
    print("ready", flush=True)
    ray.get(sleep.remote(120), timeout=120)
"""
    names = ("terminated", "interrupted", "killed", "starting")
    drivers = {name: Driver(script, tmp_path / name) for name in names}  # together, for their start takes seconds
    try:
        starting = drivers["starting"]
        assert starting.line() == "starting"
        deadline = time.monotonic() + 60
        while len(starting.remaining()) < 3 and time.monotonic() < deadline:  # itself, the GCS and one more
            time.sleep(0.02)
        starting.process.send_signal(signal.SIGTERM)
        for name in names[:3]:
            assert [drivers[name].line(), drivers[name].line()] == ["starting", "ready"], drivers[name].finish()
            assert len(drivers[name].remaining()) > 5  # the GCS, the raylet and the rest: the mark does find them
        drivers["terminated"].process.send_signal(signal.SIGTERM)
        os.killpg(drivers["interrupted"].process.pid, signal.SIGINT)  # Ctrl-C reaches the terminal's whole group
        drivers["killed"].process.kill()
        codes = {name: driver.finish()[0] for name, driver in drivers.items()}
        assert codes == {"terminated": 143, "starting": 143, "interrupted": -signal.SIGINT, "killed": -signal.SIGKILL}
        # After kill -9 nothing of ours can run; Ray's own processes notice that their driver has gone.
        wait_s = {"killed": 60}
        assert {name: driver.remaining(wait_s.get(name, 0)) for name, driver in drivers.items()} == dict.fromkeys(
            names, []
        )
    finally:
        for driver in drivers.values():
            driver.watchdog.cancel()
            driver.process.kill()
            driver.process.communicate()


@pytest.fixture(scope="module")
def running_cluster(tmp_path_factory):
    """A real `ray start --head` of three CPUs, guarded by a token: (address, home folder with the token)."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(uuid.uuid4().hex * 2)
    temp_dir = tempfile.mkdtemp(prefix="ray")  # a Unix socket's path has to be short
    mark, port = uuid.uuid4().hex, free_port()
    command = ["start", "--head", "--block", f"--port={port}", f"--temp-dir={temp_dir}", "--num-cpus=3"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    head = subprocess.Popen(
        [Path(sys.executable).parent / "ray", *command, "--include-dashboard=false"],
        env={**inherited, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(600, head.kill)
    watchdog.start()
    try:
        for line in head.stdout:
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("ray start --head ended without starting")
        yield f"127.0.0.1:{port}", home
    finally:
        watchdog.cancel()
        # Ray's own way of ending takes half a minute, and is not what is tested here.
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(timeout=60)
        head.stdout.close()
        left = processes_with(mark, wait_s=10)
        shutil.rmtree(temp_dir, ignore_errors=True)
    assert left == []


def test_a_running_cluster_is_joined_checked_and_left(tmp_path, running_cluster):
    address, home = running_cluster
    script = f"""
address, said = {address!r}, []
os.environ["RAY_ADDRESS"] = address  # what "auto" looks at first
for name, workers, cpus in [(address, 3, 1), ("auto", 1, 3)]:
    with RaySession(name, workers, cpus, gpus_per_worker=0, log_dir=folder) as session:
        child = ray.get(leave_a_child.remote(), timeout=60)
        os.kill(child, 9)
        said.append([session.gcs_address.split(":")[1] == address.split(":")[1], ray.cluster_resources()["CPU"]])
    said.append(ray.is_initialized())
try:
    RaySession(address, 2, 2, gpus_per_worker=0, log_dir=folder, timeout_s=5).__enter__()
except ClusterError as error:
    said.append(str(error))
print(json.dumps(said))
"""
    driver = Driver(script, tmp_path, HOME=str(home))
    code, out, err = driver.finish(90)
    assert (code, err) == (0, "")
    *joined, too_small = json.loads(out)
    assert joined == [[True, 3], False, [True, 3], False]
    assert too_small == (
        "cluster.workers=2 workers of 2 CPU do not fit: there is room for 1 (3 CPU and 0 GPU on 1 node); "
        "use cluster.workers=1 or add nodes, or ask for less for each worker"
    )
    assert driver.remaining(10) == []


def test_an_initialised_ray_is_used_and_left_running(tmp_path, running_cluster):
    address, home = running_cluster
    driver = Driver(
        f"""
ray.init(address={address!r}, log_to_driver=False, logging_level="ERROR")
said = []
with RaySession(None, workers=3, cpus_per_worker=1, gpus_per_worker=0, log_dir=folder) as session:
    said.append(session.gcs_address == ray.get_runtime_context().gcs_address)
said.append(ray.is_initialized())
RaySession(None, 2, cpus_per_worker=1, gpus_per_worker=0, log_dir=folder, extra_cpus=1).__enter__()  # just fits
for address, workers, gpus, *extra in [
    (None, 4, 0),
    (None, 1, 1),
    (None, 2, 0, 1.5, 1),
    (None, 3, 0, 0.25),
    ("127.0.0.1:9", 1, 0),
]:
    try:
        RaySession(address, workers, 1, gpus, folder, 20, *extra).__enter__()
    except ClusterError as error:
        said.append(str(error))
said.append(ray.cluster_resources()["CPU"])
ray.shutdown()
print(json.dumps(said))
""",
        tmp_path,
        HOME=str(home),
        RAY_AUTH_MODE="token",
    )
    code, out, err = driver.finish()
    assert code == 0, err
    used, alive, too_many, no_gpu, no_room_beside, no_quarter, elsewhere, cpus = json.loads(out)
    assert (used, alive, cpus) == (True, True, 3)
    assert too_many == (
        "cluster.workers=4 workers of 1 CPU do not fit: there is room for 3 (3 CPU and 0 GPU on 1 node); "
        "use cluster.workers=3 or add nodes, or ask for less for each worker"
    )
    assert no_gpu == (
        "cluster.workers=1 workers of 1 CPU and 1 GPU do not fit: there is room for 0 (3 CPU and 0 GPU on 1 node); "
        "add nodes, or ask for less for each worker"
    )
    assert no_room_beside == (
        "cluster.workers=2 workers of 1 CPU and the actors beside them, 1.5 CPU and 1 GPU in all, do not fit: "
        "there are 3 CPU and 0 GPU on 1 node; use fewer actors, add nodes, or ask for less for each"
    )
    assert "3 workers of 1 CPU and the actors beside them, 0.25 CPU in all, do not fit" in no_quarter
    assert elsewhere.startswith("cluster.address=127.0.0.1:9 is not the Ray that this process already uses")
    assert driver.remaining(10) == []


def test_a_cluster_with_another_token_is_named_at_once(tmp_path, running_cluster):
    address, _ = running_cluster
    refused, seconds = refusal(address, tmp_path, timeout_s=20, HOME=str(tmp_path))
    assert refused == (
        f"cluster.address={address} wants Ray's access token; set RAY_AUTH_MODE=token, with ~/.ray/auth_token here "
        "as on the head node"
    )
    assert seconds < 15


def test_nobody_at_the_address(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    refused, _ = refusal(address, tmp_path, timeout_s=20)
    assert refused == (
        f"cluster.address={address} does not answer; start it with 'ray start --head' or leave cluster.address "
        "empty to run here"
    )


def test_a_listener_that_is_no_ray_does_not_hang(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections and says nothing
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        refused, seconds = refusal(address, tmp_path, timeout_s=3)
    assert refused.startswith(f"cluster.address={address} does not answer as a Ray head within 3 s; give the port of")
    assert seconds < 10


def test_auto_where_no_ray_runs(tmp_path):
    # The search for running clusters sees the whole machine; here it sees none.
    script = "psutil.process_iter = lambda *arguments, **named: iter(())\n"
    refused, _ = refusal("auto", tmp_path, timeout_s=20, script=script, RAY_TMPDIR=str(tmp_path))
    assert refused == (
        "cluster.address=auto finds no running cluster; start it with 'ray start --head' or leave cluster.address "
        "empty to run here"
    )


def test_auto_names_what_it_found(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    refused, _ = refusal("auto", tmp_path, timeout_s=20, RAY_ADDRESS=address)
    assert refused.startswith(f"cluster.address=auto ({address}) does not answer; start it with 'ray start --head'")


@pytest.mark.parametrize("address", ["head", "head:0", "head:70000", "ray://head:10001", ":6379", ""])
def test_what_is_no_address(tmp_path, address):
    with pytest.raises(ClusterError) as error, RaySession(address, 1, 1, 0, log_dir=tmp_path):
        pass
    assert str(error.value).startswith(f"cluster.address={address} is not an address of a cluster; write host:port")


def test_a_machine_too_busy_to_start_ray_is_named(tmp_path, monkeypatch):
    def slow(**arguments):
        raise Exception("The current node timed out during startup. This could happen because …")  # Ray's own words

    monkeypatch.setattr("ray.init", slow)
    with pytest.raises(ClusterError, match="too busy for it to come up"), RaySession(None, 1, 1, 0, tmp_path):
        pass


def refusal(address: str, folder: Path, timeout_s: float, script: str = "", **environment: str) -> tuple[str, float]:
    """The one-line message of the ClusterError that joining raises, and after how many seconds."""
    driver = Driver(
        f"""
{script}
started = time.monotonic()
try:
    RaySession({address!r}, 1, 1, 0, log_dir=folder, timeout_s={timeout_s}).__enter__()
except ClusterError as error:
    print(json.dumps([str(error), time.monotonic() - started]))
""",
        folder,
        **environment,
    )
    code, out, err = driver.finish(timeout_s + 30)
    assert code == 0, err
    assert err == ""
    assert driver.remaining(2) == []
    message, seconds = json.loads(out)
    assert "\n" not in message
    return message, seconds


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
