"""A real `mlflow server` with a database behind it on loopback, which can be made to hang, to die and to come back."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest

MARK = "TRACKING_TEST_MARK"


def client(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def points(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client(uri).get_metric_history(run_id, name)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """Started by `start`, on the same port and database each time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.mark = uuid.uuid4().hex
        self.log = folder / "server.log"

    def start(self) -> None:
        command = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        files = f"--artifacts-destination={self.folder / 'files'}"
        store = [f"--backend-store-uri=sqlite:///{self.folder / 'server.db'}", files]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).parent / "mlflow", *command, *store],
                env={
                    **os.environ,
                    MARK: self.mark,
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                },
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        self.wait_until_it_answers()

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if urlopen(f"{self.uri}/health", timeout=2).read() == b"OK":
                    return
            except (URLError, OSError):
                time.sleep(0.2)
        pytest.fail(f"mlflow server did not start: {self.log.read_text()}")

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait(timeout=60)
        psutil.wait_procs(self.processes(), timeout=15)

    def send(self, number: int) -> None:
        for process in self.processes():
            process.send_signal(number)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """One that has ended, with all its processes, when the block has."""
    server = Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.send(signal.SIGCONT)
        server.process.terminate()
        psutil.wait_procs(server.processes(), timeout=15)
        left = server.processes()
        for process in left:
            process.kill()
        server.process.wait(timeout=60)
    assert left == []
