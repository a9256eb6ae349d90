"""A Ray session: started here, or joined, and left without a process behind."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray

from cluster.errors import ClusterError
from cluster.places import Demand

RAY_PACKAGE = str(Path(ray.__file__).parent)
QUIET_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
SET_BY_RAY = ("RAY_AUTH_MODE", "PYTHONBREAKPOINT")  # in this process, when it starts a cluster
REMEDY = "start it with 'ray start --head' or leave cluster.address empty to run here"

# ray.init on an address that does not answer blocks in C++ for minutes and ignores signals, so joining is first
# tried in a process that can be killed.
PROBE = """
import json, socket, sys
host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
try:
    socket.create_connection((host, port), timeout=seconds).close()
except OSError as error:
    sys.exit(f"NO ANSWER {error}")
import ray
print("CONNECTED", file=sys.stderr, flush=True)
ray.init(address=f"{host}:{port}", log_to_driver=False, logging_level="ERROR")
print(json.dumps(ray.nodes()))
"""


class RaySession:
    """Context manager around the Ray that a job runs on.

    With no address Ray is started in this process's name and everything it started is gone at the end: also after
    an exception, Ctrl-C or SIGTERM. With "auto" or "host:port" a running cluster is joined and only left. A Ray that
    this process had initialised itself is used as it is and not shut down.

    Args:
        address: None to start Ray here, "auto" to find the cluster as Ray does (RAY_ADDRESS first), or "host:port".
        workers: number of training workers that must find a place.
        cpus_per_worker: logical CPUs of each worker; started here, logical CPUs may exceed the machine's.
        gpus_per_worker: GPUs of each worker.
        log_dir: gets a link `ray-logs` to Ray's own log folder, where the workers' output is.
        timeout_s: seconds to wait for the cluster to answer, and again for its resources to appear.
        extra_cpus: logical CPUs, wherever they are, of all actors beside the workers.
        extra_gpus: GPUs of those actors.
        extra_actors: how many those are, where it matters how much each takes.
        queue_timeout_s: seconds to wait for room on a cluster that is joined: for machines that its autoscaler brings
            or that others give back. 0 refuses a run that is too large for what is there.
        on_wait: is told in words what is waited for.

    Raises:
        ClusterError: from `__enter__`, when the cluster does not answer, is too small or has not made room in time.
    """

    def __init__(
        self,
        address: str | None,
        workers: int,
        cpus_per_worker: float,
        gpus_per_worker: float,
        log_dir: Path,
        timeout_s: float = 20.0,
        extra_cpus: float = 0.0,
        extra_gpus: float = 0.0,
        extra_actors: int = 1,
        queue_timeout_s: float = 0.0,
        on_wait: Callable[[str], None] = lambda text: None,
    ):
        self.address = address
        self.demand = Demand(workers, cpus_per_worker, gpus_per_worker, extra_cpus, extra_gpus, extra_actors)
        self.log_dir = Path(log_dir)
        self.timeout_s = timeout_s
        self.queue_timeout_s = queue_timeout_s
        self.on_wait = on_wait
        self.gcs_address: str | None = None
        self._owned = False
        self._terminated = False
        self._children_before: set[int] = set()
        self._environment: dict[str, str | None] = {}

    def __enter__(self) -> "RaySession":
        if ray.is_initialized():
            self._reuse()
            return self
        self._owned = True
        self._save_process_state()
        try:
            if self.address is None:
                self._start()
            else:
                self._join(*_host_and_port(self.address))
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if not self._owned:
            return
        self._leave()
        if self._terminated and kind is SystemExit:  # ray.get has made an exit code of 1 of it
            raise SystemExit(128 + signal.SIGTERM)

    def _reuse(self) -> None:
        running = ray.get_runtime_context().gcs_address
        if self.address not in (None, "auto") and running != _with_ip(self.address):
            raise ClusterError(
                f"cluster.address={self.address} is not the Ray that this process already uses ({running}); "
                "call ray.shutdown() first or leave cluster.address empty"
            )
        self.gcs_address = running
        self.demand.require(ray.nodes())

    def _start(self) -> None:
        demand = self.demand
        # One more for the controller of the run.
        wanted = math.ceil(demand.workers * demand.cpus_per_worker + demand.extra_cpus) + 1
        try:
            context = _init(
                address="local",  # None would join whatever RAY_ADDRESS or an earlier `ray start` names
                num_cpus=max(os.cpu_count() or 1, wanted),
                include_dashboard=False,
            )
        except Exception as error:  # Ray raises this very class, after half a minute that nothing changes
            if "timed out during startup" not in str(error):
                raise
            raise ClusterError(
                "cluster.address=null starts Ray on this machine, which is too busy for it to come up in half a "
                "minute; try again when there is less to do, or give the cluster.address of a running cluster"
            ) from error
        self._joined(context)
        self.demand.require(ray.nodes())

    def _join(self, host: str, port: int) -> None:
        _use_token_on_this_machine(host)
        nodes = self._probe(host, port)
        deadline = time.monotonic() + self.timeout_s
        self._joined(_init(address=f"{host}:{port}"))
        if self.queue_timeout_s > 0:
            self.demand.wait(self.queue_timeout_s, ray.nodes, self.on_wait)
            return
        while not self.demand.fits(nodes) and time.monotonic() < deadline:
            time.sleep(0.5)
            nodes = ray.nodes()
        self.demand.require(nodes)

    def _joined(self, context: Any) -> None:
        self.gcs_address = context.address_info["gcs_address"]
        logs = Path(context.address_info["session_dir"]) / "logs"
        link = self.log_dir / "ray-logs"
        if logs.is_dir():
            self.log_dir.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(logs)

    def _probe(self, host: str, port: int) -> list[dict]:
        """The cluster's nodes, learnt by a process that is killed when it takes too long."""
        command = [sys.executable, "-P", "-c", PROBE, host, str(port), str(min(5.0, self.timeout_s))]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            probe = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            try:
                deadline = time.monotonic() + self.timeout_s
                while probe.poll() is None and time.monotonic() < deadline:
                    if "Unauthenticated" in _contents(err):  # Ray would try again for twenty seconds
                        break
                    time.sleep(0.05)
            finally:
                ended = probe.poll() is not None
                probe.kill()
                probe.wait()
            said = _contents(err)
            if ended and probe.returncode == 0:
                return json.loads(_contents(out).splitlines()[-1])
        found = f" ({host}:{port})" if self.address == "auto" else ""
        raise ClusterError(f"cluster.address={self.address}{found} {_why_not_joined(said, ended, self.timeout_s)}")

    def _save_process_state(self) -> None:
        self._children_before = {child.pid for child in psutil.Process().children()}
        # What Ray sets in this process must not steer the next session.
        self._environment = {name: os.environ.get(name) for name in (*QUIET_ENVIRONMENT, *SET_BY_RAY)}
        os.environ.update(QUIET_ENVIRONMENT)
        if _in_main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._unwind)  # the default would end this process on the spot

    def _unwind(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True
        raise SystemExit(128 + number)

    def _leave(self) -> None:
        with _signals_deferred():  # a second Ctrl-C must not leave half of Ray running
            started = _started_by_ray(self._children_before) if self.address is None else []
            try:
                ray.shutdown()
            finally:
                _end(started)
                for name, value in self._environment.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value
        if _in_main_thread() and signal.getsignal(signal.SIGTERM) == self._unwind:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _init(**arguments: Any) -> Any:
    """ray.init, quiet, and not to be interrupted half-way."""
    utils = ray._private.utils
    set_sigterm_handler = utils.set_sigterm_handler
    # Ray would put a handler that exits from wherever it is: often inside a callback that drops the exception,
    # so that SIGTERM during the start is lost or leaves processes behind.
    utils.set_sigterm_handler = lambda handler: None
    try:
        with _signals_deferred():
            return ray.init(log_to_driver=False, logging_level="ERROR", **arguments)
    finally:
        utils.set_sigterm_handler = set_sigterm_handler


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """SIGTERM and SIGINT that come inside the block take effect at its end."""
    if not _in_main_thread():
        yield
        return
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _host_and_port(address: str) -> tuple[str, int]:
    if address == "auto":
        address = _find_cluster()
    host, separator, port = address.rpartition(":")
    if not separator or not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(
            f"cluster.address={address} is not an address of a cluster; write host:port (Ray's own port is 6379), "
            "'auto', or leave cluster.address empty to run here"
        )
    return host.strip("[]"), int(port)


def _find_cluster() -> str:
    try:
        return ray._private.services.get_ray_address_from_environment("auto", None)
    except ConnectionError as error:
        raise ClusterError(f"cluster.address=auto finds no running cluster; {REMEDY}") from error


def _with_ip(address: str) -> str:
    """`address` as Ray names itself: loopback is this node's own IP."""
    host, port = _host_and_port(address)
    return ray._private.services.canonicalize_bootstrap_address(f"{host}:{port}")


def _use_token_on_this_machine(host: str) -> None:
    """Ray guards a cluster with the token in ~/.ray once there is one, but offers it only for address="auto".

    A cluster on this machine was started by the same user as a rule; without this, 127.0.0.1:6379 would be refused
    where "auto" is let in. No token is offered to another machine unless RAY_AUTH_MODE asks for it.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    if host in ("localhost", "127.0.0.1", "::1", ray.util.get_node_ip_address()):
        ray._private.ray_logging.setup_logger("ERROR", ray._private.ray_constants.LOGGER_FORMAT)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _why_not_joined(said: str, ended: bool, timeout_s: float) -> str:
    if "Unauthenticated" in said:
        return "wants Ray's access token; set RAY_AUTH_MODE=token, with ~/.ray/auth_token here as on the head node"
    if "NO ANSWER" in said or "CONNECTED" not in said:
        return f"does not answer; {REMEDY}"
    if not ended:
        return (
            f"does not answer as a Ray head within {timeout_s:g} s; give the port of 'ray start --head' (not the "
            "dashboard's), have a node of that cluster on this machine ('ray start --address=…'), or leave "
            "cluster.address empty to run here"
        )
    last = said.strip().splitlines()[-1]
    return f"cannot be joined ({last[:300]}); run the same Ray and Python there as here (ray {ray.__version__})"


def _contents(file: Any) -> str:
    file.seek(0)
    return file.read()


def _started_by_ray(children_before: set[int]) -> list[psutil.Process]:
    """Every process of the Ray that this process started, those whose parent has died included."""
    started: dict[int, psutil.Process] = {}
    for child in psutil.Process().children():
        if child.pid not in children_before and _is_ray(child):
            for process in (child, *_children(child)):
                started[process.pid] = process
    raylets = {str(pid) for pid in started}
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_RAYLET_PID") in raylets:
                started[process.pid] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    started.pop(os.getpid(), None)
    return list(started.values())


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_ray(process: psutil.Process) -> bool:
    try:
        return any(RAY_PACKAGE in word or word.startswith("ray::") for word in process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _end(processes: list[psutil.Process], grace_s: float = 5.0) -> None:
    """Wait for processes to end, kill those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=grace_s)
