"""A real Ray head with its dashboard, guarded by a token, as ``ray start --head`` makes one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from tests.cluster.test_session import MARK, free_port, processes_with

TOKEN = uuid.uuid4().hex * 2
ENDED_AFTER_S = 900  # whatever happens to the test


@dataclass(frozen=True)
class Head:
    """``url`` of the dashboard, ``address`` that a driver on this machine joins, ``mark`` of its processes."""

    url: str
    address: str
    mark: str

    def processes(self, word: str) -> list[psutil.Process]:
        """Its processes with ``word`` in their titles."""
        found = []
        for process in marked(self.mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process] if word in " ".join(process.cmdline()) else []
        return found


def plain_environment(**more: str) -> dict[str, str]:
    """This environment without what steers Ray, and without a path to this checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))} | more


@contextlib.contextmanager
def running_head(storage: Path, num_cpus: int = 3) -> Iterator[Head]:
    """A head on loopback, whose MMADA_STORAGE is ``storage``; at the end no process of it is left."""
    temp_dir, mark = tempfile.mkdtemp(prefix="ray"), uuid.uuid4().hex  # a Unix socket's path has to be short
    options = {
        "port": (port := free_port()),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": (dashboard_port := free_port()),
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,  # any that is free: others may run a Ray of their own on this machine
        "max-worker-port": 0,
        "temp-dir": temp_dir,
        "num-cpus": num_cpus,
    }
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "MMADA_STORAGE": str(storage),
        "PATH": "/usr/bin:/bin",  # the python of this environment is not on it
        MARK: mark,
    }
    process = subprocess.Popen(
        [
            Path(sys.executable).parent / "ray",
            *("start", "--head", "--block"),
            *(f"--{name}={value}" for name, value in options.items()),
        ],
        cwd=temp_dir,
        env=plain_environment(**own),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(ENDED_AFTER_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            raise AssertionError(f"ray start --head ended without starting: {''.join(said)}")
        yield Head(f"http://127.0.0.1:{dashboard_port}", f"127.0.0.1:{port}", mark)
    finally:
        watchdog.cancel()
        process.kill()  # Ray's own way of ending takes half a minute, and is not what is tested here
        for left in marked(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait(timeout=60)
        process.stdout.close()
        left_over = processes_with(mark, wait_s=10)
        shutil.rmtree(temp_dir, ignore_errors=True)
    assert left_over == []


def living(url: str) -> dict[str, list[str]]:
    """What Ray's state API says is not gone, of all drivers and jobs: actors, placement groups, tasks, objects.

    Without the one actor that Ray keeps for the whole cluster, whoever trains on it.
    """
    kinds = {"actors": ("DEAD", "class_name"), "placement_groups": ("REMOVED", "placement_group_id")}
    found = {kind: _listed(url, kind, *how) for kind, how in kinds.items()}
    found["actors"] = [name for name in found["actors"] if name != "_AutoscalingCoordinatorActor"]
    tasks = _listed(url, "tasks", "FINISHED", "state")
    found["tasks"] = [state for state in tasks if state not in ("FAILED", "NIL")]
    found["objects"] = _listed(url, "objects", "", "object_id")
    return found


def _listed(url: str, kind: str, gone: str, name: str) -> list[str]:
    those = {"filter_keys": "state", "filter_predicates": "!=", "filter_values": gone} if gone else {}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = requests.get(f"{url}/api/v0/{kind}", params={**those, "limit": 1000}, headers=headers, timeout=60)
    return [each[name] for each in answer.json()["data"]["result"]["result"]]


def marked(mark: str) -> list[psutil.Process]:
    """Processes that have come of it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found
