"""Ray's Jobs API on a real head that is guarded by a token, also through a connection that breaks."""

import contextlib
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from cluster.access_token import access_token
from cluster.errors import ClusterError
from cluster.ray_jobs import ConnectionLost, Job, RayJobs, dashboard_address
from tests.cluster.head import TOKEN, living, running_head


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A real head that is guarded by a token, of three CPUs: (URL, storage folder)."""
    storage = tmp_path_factory.mktemp("storage")
    with running_head(storage) as started:
        yield started.url, storage


@pytest.fixture
def token(monkeypatch, tmp_path):
    """A home without a token, and the right one in the environment."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return monkeypatch


class Line:
    """A TCP connection to a port that can be cut, for a while or for good."""

    def __init__(self, port: int):
        self.port, self.is_open, self.sockets = port, True, []
        self.listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.listening.getsockname()[1]}"

    def cut(self) -> None:
        self.is_open = False
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.is_open = True

    def _accept(self) -> None:
        while True:
            near, _ = self.listening.accept()
            if not self.is_open:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.port))
            self.sockets += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
        for each in (a, b):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def own_lines(text: list[str]) -> list[str]:
    """A log without what Ray writes into it, which stands anywhere."""
    lines = "".join(text).splitlines()
    return [line for line in lines if " -- Runtime env is " not in line and not line.startswith("Running entrypoint")]


def test_only_the_right_token_is_let_in_and_no_message_shows_one(head, token, tmp_path):
    url, _ = head
    token.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # an address that is given comes before it
    assert RayJobs(url).version()

    (tmp_path / "file").write_text(TOKEN + "\n")
    token.delenv("RAY_AUTH_TOKEN")
    token.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert RayJobs(url).version()

    token.setenv("RAY_AUTH_TOKEN", "not-the-token")
    with pytest.raises(ClusterError) as wrong:
        RayJobs(url).jobs()
    assert f"address={url} does not take the access token of RAY_AUTH_TOKEN; set" in str(wrong.value)
    assert "not-the-token" not in str(wrong.value)

    token.delenv("RAY_AUTH_TOKEN")
    token.delenv("RAY_AUTH_TOKEN_PATH")
    with pytest.raises(ClusterError, match="wants Ray's access token and none was given; set RAY_AUTH_TOKEN"):
        RayJobs(url).jobs()


def test_what_the_cluster_has_is_said_as_ray_says_it(head, token):
    (node,) = RayJobs(head[0]).nodes()
    assert node["Alive"] is True
    assert node["Resources"]["CPU"] == 3
    assert node["Resources"]["memory"] > 2**20
    assert RayJobs(head[0]).gpu_memory() is None


def test_jobs_are_followed_to_their_own_exit_code_and_last_lines(head, token):
    jobs = RayJobs(head[0])
    done, failed, killed, endless = (f"{name}-{uuid.uuid4().hex[:6]}" for name in ("done", "failed", "killed", "end"))
    jobs.submit(done, "echo first; echo second >&2", metadata={"mmada": "train x"})
    jobs.submit(failed, "seq 1 3000; echo 'the reason' >&2; exit 7")
    jobs.submit(killed, "kill -KILL $$")
    # What ends a run well takes a while: a job may be given longer than Ray's three seconds.
    ending = "trap 'sleep 4; echo ended well; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    patient = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    jobs.submit(endless, ending, runtime_env=patient)

    text: list[str] = []
    assert jobs.follow(done, text.append).code == 0
    assert own_lines(text) == ["first", "second"]

    text.clear()
    job = jobs.follow(failed, text.append)
    assert (job.status, job.code) == ("FAILED", 7)
    assert own_lines(text) == [*map(str, range(1, 3001)), "the reason"]
    assert "the reason" in job.message  # what stays if its node is gone

    assert jobs.wait(killed, 60).code == 137

    deadline = time.monotonic() + 60
    while "up" not in jobs.logs(endless).splitlines() and time.monotonic() < deadline:
        time.sleep(0.2)
    jobs.stop(endless)
    stopped = jobs.wait(endless, 60)
    assert (stopped.status, stopped.code) == ("STOPPED", 143)
    assert jobs.logs(endless).endswith("ended well\n")

    listed = {job.id: job for job in jobs.jobs()}
    assert {done, failed, killed, endless} <= listed.keys()
    assert listed[done].metadata["mmada"] == "train x"
    with pytest.raises(ClusterError, match="job=nobody is not known at"):
        jobs.job("nobody")


def test_a_connection_that_breaks_is_taken_up_where_it_was_and_ends_no_job(head, token):
    line = Line(int(head[0].rpartition(":")[2]))
    near, far = RayJobs(line.address), RayJobs(head[0])
    job_id = f"counts-{uuid.uuid4().hex[:6]}"
    far.submit(job_id, "for i in $(seq 1 20); do echo number $i; sleep 0.2; done; exit 3")
    text: list[str] = []

    def write(new: str) -> None:
        text.append(new)
        if line.is_open and len(text) == 3:
            line.cut()
            threading.Timer(1.5, line.mend).start()

    job = near.follow(job_id, write)
    assert job.code == 3
    assert own_lines(text) == [f"number {i}" for i in range(1, 21)]

    line.cut()
    with pytest.raises(ConnectionLost, match=f"address={line.address} does not answer"):
        near.follow(job_id, write, patience_s=1.0)


TRAINING = """
import sys, time
from pathlib import Path
import ray.train
from cluster.launch import run_workers
from cluster.session import RaySession

def work(config):
    ray.train.report({"up": 1})
    time.sleep(600)

folder = Path(sys.argv[1])
with RaySession("auto", workers=1, cpus_per_worker=1, gpus_per_worker=0, log_dir=folder, timeout_s=120):
    run_workers(
        work, {}, workers=1, resources_per_worker={"CPU": 1}, backend="gloo", attempt_dir=folder / "attempt-1",
        max_failures=0, on_message=lambda message: print("said", message, flush=True),
    )
"""


def test_a_training_job_that_is_stopped_leaves_no_actor_on_the_cluster(head, token, tmp_path):
    jobs = RayJobs(head[0])
    script, job_id = tmp_path / "training.py", f"training-{uuid.uuid4().hex[:6]}"
    script.write_text(TRAINING)
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2]), "RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    jobs.submit(job_id, f"exec {sys.executable} {script} {tmp_path}", runtime_env=environment)
    deadline = time.monotonic() + 120
    while "said" not in (said := jobs.logs(job_id)) and time.monotonic() < deadline:
        assert not jobs.job(job_id).has_ended, said
        time.sleep(0.5)
    assert {"EndingCleaner", "RayTrainWorker"} <= {*living(jobs.address)["actors"]}
    jobs.stop(job_id)
    assert jobs.wait(job_id, 90).status == "STOPPED"
    deadline = time.monotonic() + 60
    while (left := living(jobs.address)["actors"]) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []  # but for the one that Ray keeps once for the whole cluster


def test_an_address_comes_from_the_command_line_then_from_the_environment(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert dashboard_address("head") == "http://head:8265"
    assert dashboard_address("head:1234/") == "http://head:1234"
    assert dashboard_address("https://ray.example.com/team/") == "https://ray.example.com/team"
    with pytest.raises(ClusterError, match="--address is missing"):
        dashboard_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://one:8265")
    assert dashboard_address(None) == "http://one:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://two:8265")
    assert dashboard_address(None) == "http://two:8265"
    assert dashboard_address("three:1") == "http://three:1"
    for wrong in ("ray://head:10001", "auto", "http://head:port", ""):
        with pytest.raises(ClusterError, match="is not the address of a dashboard|--address"):
            dashboard_address(wrong)


def test_the_token_of_this_machine_goes_to_no_other_unasked(token, tmp_path):
    token.delenv("RAY_AUTH_TOKEN")
    assert access_token("http://127.0.0.1:8265") is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("mine\n")
    assert access_token("http://127.0.0.1:8265").value == "mine"
    assert access_token("http://elsewhere:8265") is None
    token.setenv("RAY_AUTH_MODE", "token")
    assert access_token("http://elsewhere:8265").value == "mine"
    token.setenv("RAY_AUTH_TOKEN", "given")
    assert access_token("http://elsewhere:8265").value == "given"
    token.setenv("RAY_AUTH_MODE", "disabled")
    assert access_token("http://127.0.0.1:8265") is None
    token.setenv("RAY_AUTH_MODE", "token")
    token.delenv("RAY_AUTH_TOKEN")
    token.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match=r"RAY_AUTH_TOKEN_PATH=.*none cannot be read \(No such file"):
        access_token("http://elsewhere:8265")


def test_a_code_is_what_a_shell_would_say():
    assert Job("a", "SUCCEEDED").code == 0
    assert Job("a", "FAILED", exit_code=2).code == 2
    assert Job("a", "FAILED", exit_code=-signal.SIGKILL).code == 137
    assert Job("a", "FAILED").code == 1  # it never came to its command
    assert Job("a", "STOPPED").code == 143
