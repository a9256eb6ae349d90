"""A Ray cluster of several nodes on this machine, each with its own raylet and, for root, its own network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path

import psutil

from tests.cluster.test_session import MARK, free_port, processes_with

START_TIMEOUT_S = 180
ENDED_AFTER_S = 900  # whatever happens to the test
SUBNET = "10.77.0"


class Node:
    """One raylet and all that it started; ``netns`` names its network, None for the machine's own."""

    def __init__(self, command: list[str], address: str, netns: str | None, environment: dict[str, str]) -> None:
        self.address, self.netns = address, netns
        self.process = subprocess.Popen(
            [*within(netns), str(Path(sys.executable).parent / "ray"), "start", "--block", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._watchdog = threading.Timer(ENDED_AFTER_S, self.process.kill)
        self._watchdog.start()

    def wait_until_started(self) -> None:
        said: list[str] = []
        starting = threading.Timer(START_TIMEOUT_S, self.process.kill)
        starting.start()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        starting.cancel()
        assert "Ray runtime started" in said[-1], f"ray start ended: {''.join(said)}"

    def holds(self, pid: int) -> bool:
        """Whether a process is one of this node's."""
        return any(parent.pid == self.process.pid for parent in psutil.Process(pid).parents())

    def kill(self) -> None:
        """kill -9 of everything at once, as when the machine loses its power."""
        self._watchdog.cancel()
        processes = [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        processes += [child for process in processes for child in process.children(recursive=True)]
        for process in processes:
            process.send_signal(signal.SIGSTOP)  # nobody sees another one die and reacts
        for process in processes:
            process.kill()
        self.process.wait(timeout=60)
        psutil.wait_procs(processes, timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Machines:
    """Context manager: a head without CPUs, and ``count`` nodes of ``cpus`` each.

    Commands that join it run within the head's network: ``[*machines.within, …]``.
    """

    def __init__(self, count: int, cpus: int) -> None:
        self.count, self.cpus = count, cpus
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="ray"))  # a Unix socket's path has to be short
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "HOME": str(self.folder), MARK: self.mark}
        self.environment = {**inherited, **quiet}  # and no access token in this home
        self.netns: list[str] = []
        self.nodes: list[Node] = []

    def __enter__(self) -> Machines:
        try:
            self.netns = _connected(self.mark[:6], self.count + 1)
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        left = self._end()
        assert left == []

    @property
    def within(self) -> list[str]:
        """What a command is put behind to run on the head's machine."""
        return within(self.netns[0] if self.netns else None)

    def _start(self) -> None:
        port = 6379 if self.netns else free_port()
        self.address = f"{self._address(0)}:{port}"
        self._add(["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"])
        self.nodes[0].wait_until_started()
        for _ in range(self.count):
            self._add([f"--address={self.address}", f"--num-cpus={self.cpus}"])
        for node in self.nodes[1:]:
            node.wait_until_started()

    def _add(self, options: list[str]) -> None:
        place = len(self.nodes)
        address = self._address(place)
        agents = {"dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"}
        ports = [f"--{name}={free_port()}" for name in sorted(agents)]
        memory = f"--object-store-memory={200 << 20}"
        command = [*options, f"--node-ip-address={address}", f"--temp-dir={self.folder / str(place)}", memory, *ports]
        netns = self.netns[place] if self.netns else None
        self.nodes.append(Node(command, address, netns, self.environment))

    def _address(self, place: int) -> str:
        return _address(place) if self.netns else f"127.0.0.{1 + place}"

    def _end(self) -> list[str]:
        for node in reversed(self.nodes):
            node.kill()
        left = processes_with(self.mark, wait_s=10)
        for name in self.netns:
            _ip("netns", "del", name)
        shutil.rmtree(self.folder, ignore_errors=True)
        return left


def within(netns: str | None) -> list[str]:
    """The words before a command that runs in a network of its own."""
    return [] if netns is None else ["ip", "netns", "exec", netns]


def _address(place: int) -> str:
    return f"{SUBNET}.{10 + place}"


def _connected(name: str, count: int) -> list[str]:
    """Network namespaces, joined by a bridge in the first; none where this user may not make any."""
    names = [f"mmada-{name}-{place}" for place in range(count)]
    if shutil.which("ip") is None or not _ip("netns", "add", names[0]):
        return []
    head = names[0]
    made = _ip("-n", head, "link", "add", "bridge", "type", "bridge") and _up(head, "bridge", _address(0))
    for place, node in enumerate(names[1:], start=1):
        link = f"node{place}"
        made = (
            made
            and _ip("netns", "add", node)
            and _ip("-n", head, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", node)
            and _ip("-n", head, "link", "set", link, "master", "bridge", "up")
            and _up(node, "eth0", _address(place))
        )
    if not made:
        for each in names:
            _ip("netns", "del", each)
        return []
    return names


def _up(netns: str, link: str, address: str) -> bool:
    return (
        _ip("-n", netns, "link", "set", "lo", "up")
        and _ip("-n", netns, "addr", "add", f"{address}/24", "dev", link)
        and _ip("-n", netns, "link", "set", link, "up")
        and _ip("-n", netns, "route", "add", "default", "dev", link)  # Ray finds its own address by it
    )


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0
