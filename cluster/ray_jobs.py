"""Ray's Jobs API over HTTP: what is asked of a cluster that runs elsewhere, and its jobs' logs, followed.

Ray's own client is not used: RAY_ADDRESS would overrule the address that it is given, and a host that does not answer
would hold it for minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests

from cluster.access_token import HOW_TO_GIVE, access_token
from cluster.errors import ClusterError

DASHBOARD_PORT = 8265
CONNECT_SECONDS, READ_SECONDS, UPLOAD_SECONDS = 5.0, 60.0, 600.0
# A connection that was lost is tried again for so long, in growing steps.
PATIENCE_SECONDS = 120.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class ConnectionLost(ClusterError):
    """The cluster does not answer, which may pass."""


@dataclass(frozen=True)
class Job:
    """A submitted job. ``started`` and ``ended`` are seconds since 1970; ``exit_code`` is that of its command."""

    id: str
    status: str
    entrypoint: str = ""
    message: str = ""
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in ENDED

    @property
    def code(self) -> int:
        """The exit code as a shell would give it; 143 (ended by SIGTERM) for a job that was stopped."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return 143
        if self.exit_code is None:  # it never came to its command, or its node died
            return 1
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code

    @property
    def seconds(self) -> float | None:
        """How long it has run, or ran."""
        return None if self.started is None else (self.ended or time.time()) - self.started


def dashboard_address(given: str | None) -> str:
    """The URL of a cluster's dashboard: what was given, or else RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Raises:
        ClusterError: there is none, or it is of another kind.
    """
    name, address = "--address", given
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if address is None and os.environ.get(variable):
            name, address = variable, os.environ[variable]
    if address is None:
        raise ClusterError(
            f"--address is missing; give the cluster's dashboard, http://HEAD:{DASHBOARD_PORT}, or set "
            "RAY_API_SERVER_ADDRESS"
        )
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        is_url = False
    if not is_url or address in ("auto", "local"):
        raise ClusterError(
            f"{name}={address} is not the address of a dashboard; give http://HEAD:{DASHBOARD_PORT}, with the host and "
            "port of the cluster's dashboard"
        )
    if "://" not in address and parts.port is None:
        url = f"{url}:{DASHBOARD_PORT}"
    return url.rstrip("/")


class RayJobs:
    """The jobs of one cluster, and what it has.

    Args:
        address: URL of the dashboard or ``host:port``; None takes it from the environment, as Ray does.

    Raises:
        ClusterError: from everything here, in one line: no cluster there (ConnectionLost), a token that is missing or
            wrong, a job that does not exist.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = dashboard_address(address)
        self.token = access_token(self.address)
        self.headers = {"Authorization": f"Bearer {self.token.value}"} if self.token else {}
        self._http = requests.Session()

    def version(self) -> str:
        """Ray's version there. Also the cheapest way to learn whether someone answers and lets us in."""
        return self._json("GET", "/api/version")["ray_version"]

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes in the form of ray.nodes(): ``Alive`` and ``Resources`` of each."""
        listed = self._json("GET", "/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
        return [{"Alive": each["state"] == "ALIVE", "Resources": each["resources_total"]} for each in listed]

    def gpu_memory(self) -> int | None:
        """Bytes of the smallest GPU, or None where none is reported."""
        nodes = self._json("GET", "/nodes?view=summary")["data"]["summary"]
        sizes = [gpu.get("memoryTotal") for node in nodes for gpu in node.get("gpus") or ()]
        return min((size for size in sizes if size), default=0) * 2**20 or None

    def upload(self, package: bytes, name: str) -> str:
        """Bring a zip file to the cluster, unless it is there, and give the URI by which a job names it.

        ``name`` must change with the content. The cluster keeps it while a job uses it, and ten minutes for that job to
        come.
        """
        path = f"/api/packages/gcs/{name}"
        if self._ask("GET", path, accept=(200, 404)).status_code == 404:
            self._ask("PUT", path, data=package, read_s=UPLOAD_SECONDS)
        return f"gcs://{name}"

    def submit(self, job_id: str, entrypoint: str, **details: Any) -> None:
        """Start a job. ``details``: ``runtime_env``, ``metadata``, ``entrypoint_num_cpus``, as Ray names them."""
        self._json("POST", "/api/jobs/", json={"submission_id": job_id, "entrypoint": entrypoint, **details})

    def jobs(self) -> list[Job]:
        """The submitted jobs that the cluster remembers, the newest first."""
        found = [_job(each) for each in self._json("GET", "/api/jobs/") if each["type"] == "SUBMISSION"]
        return sorted(found, key=lambda job: job.started or 0, reverse=True)

    def job(self, job_id: str) -> Job:
        """One job."""
        answer = self._ask("GET", f"/api/jobs/{job_id}", accept=(200, 404))
        if answer.status_code == 404:
            raise ClusterError(f"job={job_id} is not known at {self.address}; 'mmada jobs' lists those that are")
        return _job(self._decoded(answer))

    def logs(self, job_id: str) -> str:
        """What a job has written so far."""
        return self._json("GET", f"/api/jobs/{job_id}/logs")["logs"]

    def stop(self, job_id: str) -> None:
        """Ask a job to end; it has the time of its RAY_JOB_STOP_WAIT_TIME_S for it."""
        self._ask("POST", f"/api/jobs/{job_id}/stop")

    def wait(self, job_id: str, timeout_s: float) -> Job:
        """Wait for a job's end; it as it then is, ended or not."""
        deadline = time.monotonic() + timeout_s
        while not (job := self.job(job_id)).has_ended and time.monotonic() < deadline:
            time.sleep(0.3)
        return job

    def follow(self, job_id: str, write: Callable[[str], None], patience_s: float = PATIENCE_SECONDS) -> Job:
        """Hand a job's log to ``write`` from its beginning, as it grows, until the job has ended; it as it then is.

        A connection that is lost is taken up again where it was. What of a failed job's log cannot be had any more,
        because the node is gone that it lay on, is replaced by the lines that Ray kept of it.

        Raises:
            ConnectionLost: nobody has answered for ``patience_s`` seconds.
        """
        reader = _Reader(write)
        lost_since, pause = None, 0.5
        while True:
            before = reader.num_read
            try:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                    asyncio.run(self._tail(job_id, reader))
                job = self.job(job_id)
                self._rest(job, reader)  # all that there is to read where a proxy lets no stream through
                if job.has_ended:
                    return job
                lost_since = None
            except ConnectionLost:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > patience_s:
                    raise
            pause = 0.5 if reader.num_read > before else min(pause * 2, 8.0)
            time.sleep(pause)

    async def _tail(self, job_id: str, reader: _Reader) -> None:
        reader.rewind()
        url = f"{self.address}/api/jobs/{job_id}/logs/tail"
        trust: ssl.SSLContext | bool = True
        if url.startswith("https"):  # requests takes it from there, aiohttp does not
            trust = ssl.create_default_context(cafile=os.environ.get("REQUESTS_CA_BUNDLE"))
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        async with (
            aiohttp.ClientSession(headers=self.headers, trust_env=True, timeout=limits) as session,
            session.ws_connect(url, heartbeat=20, max_msg_size=0, ssl=trust) as socket,
        ):
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    reader.read(message.data)

    def _rest(self, job: Job, reader: _Reader) -> None:
        """What the stream did not bring."""
        try:
            whole = self.logs(job.id)
        except ClusterError:
            whole = ""
        if len(whole) >= reader.num_read:
            reader.rewind()
            reader.read(whole)
        if job.status == "FAILED" and not whole:
            reader.write(job.message.rstrip() + "\n")

    def _json(self, method: str, path: str, **request: Any) -> Any:
        return self._decoded(self._ask(method, path, **request))

    def _decoded(self, answer: requests.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise ClusterError(
                f"address={self.address} answers, but not as Ray's dashboard; give http://HEAD:{DASHBOARD_PORT}, with "
                "the port of the dashboard"
            ) from error

    def _ask(
        self,
        method: str,
        path: str,
        accept: tuple[int, ...] = (200,),
        read_s: float = READ_SECONDS,
        **request: Any,
    ) -> requests.Response:
        try:
            answer = self._http.request(
                method, self.address + path, headers=self.headers, timeout=(CONNECT_SECONDS, read_s), **request
            )
        except requests.exceptions.SSLError as error:
            raise ClusterError(
                f"address={self.address} has a certificate that is not trusted here; set REQUESTS_CA_BUNDLE to the "
                "file of who signed it"
            ) from error
        except requests.exceptions.RequestException as error:
            raise ConnectionLost(
                f"address={self.address} does not answer; is the cluster up, and this the host and port of its "
                f"dashboard (usually {DASHBOARD_PORT}; not 6379, which is its nodes')?"
            ) from error
        if answer.status_code in accept:
            return answer
        raise ClusterError(f"address={self.address} {self._refusal(answer)}")

    def _refusal(self, answer: requests.Response) -> str:
        if answer.status_code in (401, 403) and self.token is None:
            return f"wants Ray's access token and none was given; {HOW_TO_GIVE}"
        if answer.status_code in (401, 403) and self.token is not None:
            return f"does not take the access token of {self.token.source}; {HOW_TO_GIVE}"
        if answer.status_code in (502, 503, 504):
            return f"has a proxy that finds no dashboard (HTTP {answer.status_code}); see whether the head is up"
        lines = [line for line in answer.text.splitlines() if line.strip()]
        if answer.status_code == 404 or "<html" in answer.text.lower():
            return f"answers, but not as Ray's dashboard (HTTP {answer.status_code}); give its host and port"
        return f"refuses (HTTP {answer.status_code}): {lines[-1].strip()[:300] if lines else answer.reason}"


class _Reader:
    """Passes on of a text that is read again from its beginning only what is new."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.num_read = 0
        self._position = 0

    def rewind(self) -> None:
        self._position = 0

    def read(self, text: str) -> None:
        new = text[max(0, self.num_read - self._position) :]
        self._position += len(text)
        self.num_read = max(self.num_read, self._position)
        if new:
            self.write(new)


def _job(said: dict[str, Any]) -> Job:
    def seconds(name: str) -> float | None:
        return said[name] / 1000 if said.get(name) else None

    return Job(
        id=said.get("submission_id") or said.get("job_id") or "",
        status=said["status"],
        entrypoint=said.get("entrypoint") or "",
        message=said.get("message") or "",
        exit_code=said.get("driver_exit_code"),
        started=seconds("start_time"),
        ended=seconds("end_time"),
        metadata=said.get("metadata") or {},
    )
