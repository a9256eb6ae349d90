"""One actor of a pool from both ends: the process that runs somebody's class, and how its end is brought about."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray

from cluster.actor_status import ActorStatus

RAISED, RETURNED = "raised", "returned"


@dataclass(frozen=True)
class ActorResources:
    """What each actor takes of its node, in Ray's logical units, and what it finds in its environment."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    env_vars: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """As Ray's ``options`` takes them. The pool itself restarts actors and repeats tasks."""
        chosen: dict[str, Any] = {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        chosen |= {"scheduling_strategy": "DEFAULT"}  # not in the placement group of a trial that this one belongs to
        return chosen | ({"runtime_env": {"env_vars": dict(self.env_vars)}} if self.env_vars else {})


class Host:
    """The actor: makes the guest, and gives back what its methods raise as a line of text."""

    def start(self, actor_class: type, arguments: Mapping[str, Any]) -> tuple[str, Any, float]:
        made = _attempt(actor_class, **arguments)
        if made[0] == RAISED:
            return made
        self.guest = made[1]
        return RETURNED, (os.getpid(), ray.get_runtime_context().get_node_id()), made[2]

    def call(self, method: str, *args: Any) -> tuple[str, Any, float]:
        return _attempt(getattr(self.guest, method), *args)

    def check(self) -> tuple[str, Any, float]:
        return RETURNED, None, 0.0


def _attempt(function: Callable[..., Any], *args: Any, **named: Any) -> tuple[str, Any, float]:
    started = time.perf_counter()
    try:
        value = function(*args, **named)
    except Exception as error:
        traceback.print_exc()  # into the log of this process; the pool's owner gets a line
        return RAISED, f"{type(error).__name__}: {last_line(str(error))}", time.perf_counter() - started
    return RETURNED, value, time.perf_counter() - started


def kill(actor: ActorStatus) -> None:
    """Whatever is left of an actor. A stopped process ignores Ray for five seconds, and holds its memory meanwhile."""
    if actor.handle is None:
        return
    process = local_process(actor)
    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(actor.handle, no_restart=True)
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def local_process(actor: ActorStatus) -> psutil.Process | None:
    """The actor's process, if it has one on this node that is still Ray's."""
    if actor.pid is None or actor.node_id != ray.get_runtime_context().get_node_id():
        return None
    try:
        process = psutil.Process(actor.pid)
        return process if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::") else None
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def why_died(error: Exception) -> str:
    """Ray's page about a lost actor in a few words."""
    text = str(error)
    if "connection error code 2" in text:
        return "its process has died (killed, out of memory or crashed)"
    _, found, exit_detail = text.partition("Worker exit detail: ")
    said = exit_detail if found else last_line(text)
    return "its process has died: " + " ".join(said.split()).split(". ")[0].rstrip(".")


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "(no message)"
