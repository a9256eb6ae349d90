"""Actors of one class that share a queue of tasks, survive each other's death and follow one state.

The pool has no thread of its own: it is driven by its owner's calls, and Ray does the work between them. An owner that
stays away delays only what depends on it (results are taken up, tasks handed out and losses noticed at its next call),
never judges late what came in time, and need not guard what it shares with the pool's callbacks.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray

from cluster.actor_host import RAISED, RETURNED, ActorResources, Host, kill, last_line, local_process, why_died
from cluster.actor_status import (
    ActorStatus,
    Call,
    Done,
    Failure,
    FailureKind,
    PoolEvent,
    Step,
    Task,
    next_step,
    next_time,
    pause_before,
)
from cluster.errors import ClusterError

__all__ = ["ActorPool", "ActorResources", "Done", "Failure", "PoolEvent"]

_CHECK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class _State:
    """The newest state call; holds the references in ``args`` for as long as an actor may need them."""

    number: int
    version: int
    method: str
    args: tuple[Any, ...]
    timeout_s: float


class ActorPool:
    """``size`` actors made by ``actor_class(**actor_arguments)``, each at one task at a time.

    An actor that dies or hangs (no result in time; it is then killed) is replaced, and its task goes to another one.
    A place that loses actor after actor is filled again after longer and longer pauses, up to half a minute.
    Every actor runs the newest state call before its next task. Use as a context manager, or ``close`` at the end.

    Args:
        actor_class: any class whose instances have the methods that tasks name; the actors' processes must be able to
            import it.
        actor_arguments: keyword arguments of its constructor; references among them arrive as references.
        size: number of actors, at least 1.
        resources: what each takes.
        task_timeout_s: seconds after which a task hangs, unless it says otherwise.
        start_timeout_s: seconds for an actor to find a place and to be constructed.
        max_replacements: how often one place may be filled anew without the pool finishing any task in between.
        retries: how often a task whose actor was lost goes to another one.
        retry_raised: whether a task whose method raises is tried again as well.
        on_event: called with every PoolEvent, from within the owner's calls.

    Raises:
        ClusterError: from any method, once actors are lost again and again and nothing gets done.
    """

    def __init__(
        self,
        actor_class: type,
        actor_arguments: Mapping[str, Any],
        size: int,
        *,
        resources: ActorResources | None = None,
        task_timeout_s: float,
        start_timeout_s: float,
        max_replacements: int = 3,
        retries: int = 2,
        retry_raised: bool = False,
        on_event: Callable[[PoolEvent], None] = lambda event: None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size} actors do nothing; use 1 or more")
        self.name, self.size = actor_class.__name__, size
        self._recipe = (ray.put(actor_class), ray.put(dict(actor_arguments)))
        # A class of its own name: Ray shows it in the list of processes.
        host = type(self.name, (Host,), {})
        self._host = ray.remote(host).options(**(resources or ActorResources()).options())
        self._task_timeout_s, self._start_timeout_s = task_timeout_s, start_timeout_s
        self._max_replacements, self._retries, self._retry_raised = max_replacements, retries, retry_raised
        self._on_event = on_event
        self._queue: deque[Task] = deque()
        self._keys: set[Any] = set()  # of all tasks that ``wait`` has not returned
        self._done: list[Done] = []
        self._events: list[PoolEvent] = []
        self._state: _State | None = None
        self._states: dict[int, tuple[int, Any]] = {}
        self._broken: str | None = None
        self._ever_started = False
        self._actors = [ActorStatus(index) for index in range(size)]
        self._act()

    def __enter__(self) -> ActorPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, key: Any, method: str, *args: Any, timeout_s: float | None = None) -> None:
        """Queue ``method(*args)``; its Done has the ``key``, which must be hashable and not be outstanding already.

        References to objects among ``args`` arrive as the objects.
        """
        if key in self._keys:
            raise ValueError(f"key={key!r} is outstanding; give every task a key of its own")
        self._keys.add(key)
        self._queue.append(Task(key, method, args, self._task_timeout_s if timeout_s is None else timeout_s))
        if any(actor.call is None for actor in self._actors):
            self._advance()

    def outstanding(self) -> set[Any]:
        """Keys of the tasks that are queued, running, or finished and not yet returned by ``wait``."""
        return set(self._keys)

    def wait(self, timeout_s: float, wake: Sequence[Any] = ()) -> list[Done]:
        """What has finished since the last time; waits for the first of it while something is under way.

        Returns early, also with nothing, when a reference in ``wake`` is ready: another pool's ``refs()``, say, or
        ``Exchange.ask_news``. With nothing under way and no ``wake`` it returns at once.
        """
        deadline = time.monotonic() + timeout_s
        self._advance()
        while not self._done and (self._keys or wake) and time.monotonic() < deadline:
            if self._sleep(deadline, wake):
                self._advance()
                break
            self._advance()
        done, self._done = self._done, []
        self._keys.difference_update(each.key for each in done)
        return done

    def refs(self) -> list[Any]:
        """References to what the actors are at, for somebody else's ``wake``."""
        return [actor.call.ref for actor in self._actors if actor.call is not None]

    def cancel_all(self) -> None:
        """Forget all tasks. An actor that is at one is used again when it is done, or killed after the timeout."""
        self._queue.clear()
        self._done.clear()
        self._keys.clear()
        for actor in self._actors:
            if actor.call is not None:
                actor.call.task = None

    def set_state(self, version: int, method: str, *args: Any, timeout_s: float) -> None:
        """Every actor is to run ``method(*args)`` before its next task: idle ones now, busy and new ones as soon as
        they can. What an actor has not begun of an older state call is never run.

        References among ``args`` arrive as objects and are held until the next call; they must not be owned by a
        process that may die before (``cluster.weights.fetch`` and ``publish`` them again for that).
        """
        number = self._state.number + 1 if self._state else 1
        self._state = _State(number, version, method, args, timeout_s)
        self._advance()

    def states(self) -> dict[int, tuple[int, Any]]:
        """By index of the actor: the version of the last state call it has run, and what that returned."""
        return dict(self._states)

    def wait_state(self, version: int, timeout_s: float) -> dict[int, tuple[int, Any]]:
        """Wait until all actors, replacements included, have run the newest state call; ``states()``.

        Raises ClusterError when that takes too long, and ValueError if the newest is not of ``version``.
        """
        if self._state is None or self._state.version != version:
            raise ValueError(f"version={version} is not the newest state")
        deadline = time.monotonic() + timeout_s
        self._advance()
        while behind := [actor.index for actor in self._actors if actor.state != self._state.number]:
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"{len(behind)} of {self.size} {self.name} actors have not taken version {version} within "
                    f"{timeout_s:g} s (actors {', '.join(map(str, behind[:8]))}); see their logs, or allow more time"
                )
            self._sleep(deadline)
            self._advance()
        return self.states()

    def pids(self) -> dict[int, int]:
        """Process ids of the actors that have started, by index, each on its own node."""
        return {actor.index: actor.pid for actor in self._actors if actor.pid is not None}

    def close(self, timeout_s: float = 10.0) -> None:
        """End all actors. Idle ones may tidy up (``atexit``); those that are busy or take longer are killed."""
        self.cancel_all()
        if not ray.is_initialized():
            return
        self._broken = self._broken or f"the pool of {self.name} actors is closed"
        with contextlib.suppress(ClusterError, ray.exceptions.RayError):  # all end in any case
            self._collect()  # who is idle
        own = {actor.index: local_process(actor) for actor in self._actors}
        for actor in self._actors:
            if actor.is_started and actor.call is None:
                actor.handle.__ray_terminate__.remote()
            else:
                kill(actor)
        _, alive = psutil.wait_procs([each for each in own.values() if each], timeout=timeout_s)
        for actor in self._actors:
            kill(actor)
            self._vacate(actor)
        psutil.wait_procs(alive, timeout=timeout_s)
        self._state = None

    def _sleep(self, deadline: float, wake: Sequence[Any] = ()) -> bool:
        """Until something is heard, the time has come for something, or one of ``wake`` is ready: whether one is."""
        seconds = max(0.0, min(deadline, *map(next_time, self._actors)) - time.monotonic())
        waited_for = [*self.refs(), *wake]
        if not waited_for:
            time.sleep(seconds)
            return False
        ready, _ = ray.wait(waited_for, num_returns=1, timeout=seconds, fetch_local=False)
        return bool(ready) and any(ready[0] == each for each in wake)

    def _advance(self) -> None:
        """Take up what has come, then give every actor what is next for it."""
        if self._broken is not None:
            raise ClusterError(self._broken)
        try:
            self._collect()
            self._act()
        finally:  # not earlier: the owner may raise, or call the pool
            events, self._events = self._events, []
            for event in events:
                self._on_event(event)

    def _collect(self) -> None:
        calling = {actor.call.ref: actor for actor in self._actors if actor.call is not None}
        if not calling:
            return
        # Ready is what has been computed, on whatever node: the way here must not count as hanging.
        ready, _ = ray.wait(list(calling), num_returns=len(calling), timeout=0, fetch_local=False)
        for ref in ready:
            self._take_up(calling[ref], ref)

    def _take_up(self, actor: ActorStatus, ref: Any) -> None:
        call = actor.call
        assert call is not None
        try:
            outcome, value, seconds = ray.get(ref, timeout=call.timeout_s)
        except ray.exceptions.RayTaskError as error:  # not by the method: arguments or value cannot be passed
            if isinstance(error, ray.exceptions.ObjectLostError):
                self._argument_lost(actor, call, f"an argument's object is gone ({type(error.cause).__name__})")
                return
            outcome, value, seconds = RAISED, last_line(str(error)), 0.0
        except ray.exceptions.RayError as error:
            self._lose(actor, "died", why_died(error))
            return
        now = time.monotonic()
        if outcome == RAISED and call.kind in ("start", "state"):
            what = "its constructor" if call.kind == "start" else "its state call"
            self._lose(actor, "died", f"{what} raised {value}")
            return
        actor.call, actor.suspect, actor.idle_since = None, False, now
        if call.kind == "start":
            actor.pid, actor.node_id = value
            self._ever_started = True
        elif call.kind == "state":
            assert self._state is not None
            actor.state = call.state
            self._states[actor.index] = (call.version, value)
        elif call.kind == "task":
            actor.lost_since_own = 0
            for each in self._actors:
                each.lost_in_a_row = 0
            if call.task is not None:
                self._finish(actor, call.task, outcome, value, seconds)
        if actor.lost_at is not None and actor.state == self._newest_state:
            self._events.append(PoolEvent("replaced", actor.index, "", seconds=now - actor.lost_at))
            actor.lost_at = None

    def _finish(self, actor: ActorStatus, task: Task, outcome: str, value: Any, seconds: float) -> None:
        if outcome == RETURNED:
            self._done.append(Done(task.key, value, None, actor.index, seconds))
        else:
            self._retry_or_fail(actor, task, "raised", value, seconds, may_retry=self._retry_raised)

    def _argument_lost(self, actor: ActorStatus, call: Call, message: str) -> None:
        """The object behind a reference is gone: no actor can do better."""
        actor.call, actor.idle_since = None, time.monotonic()
        if call.kind != "task":
            what = f"state of version {call.version}" if call.kind == "state" else "arguments"
            self._break(
                f"the {what} for {self.name} actors cannot be had: {message}; let a process own it that outlives them"
            )
        if call.task is not None:
            self._retry_or_fail(actor, call.task, "lost", message, actor.idle_since - call.since, may_retry=False)

    def _retry_or_fail(
        self, actor: ActorStatus, task: Task, kind: FailureKind, message: str, seconds: float, *, may_retry: bool
    ) -> None:
        if may_retry and task.attempts <= self._retries:
            self._queue.appendleft(task)
            lost_seconds = seconds if kind == "raised" else 0.0  # else the actor's own event has them
            self._events.append(PoolEvent("retried", actor.index, message, lost_seconds=lost_seconds, key=task.key))
        else:
            self._done.append(Done(task.key, None, Failure(kind, message, task.attempts), actor.index, seconds))

    def _lose(self, actor: ActorStatus, kind: Any, reason: str) -> None:
        """An actor is no more: see to its task, its place, and whether there is any sense in going on."""
        now, call = time.monotonic(), actor.call
        task = call.task if call is not None else None
        lost_seconds = now - call.since if call is not None and task is not None else 0.0
        kill(actor)
        self._vacate(actor)
        actor.lost_at = now if actor.lost_at is None else actor.lost_at
        actor.lost_in_a_row += 1
        actor.lost_since_own += 1
        actor.not_before = now + pause_before(actor.lost_since_own)
        for other in self._actors:
            other.suspect = other.handle is not None
        self._events.append(PoolEvent(kind, actor.index, reason, lost_seconds=lost_seconds))
        if task is not None:
            self._retry_or_fail(actor, task, kind, reason, lost_seconds, may_retry=True)
        if actor.lost_in_a_row > self._max_replacements:
            self._break(
                f"{self.name} actor {actor.index} was lost {actor.lost_in_a_row} times and no task was done in "
                f"between; the last time {reason}"
            )

    def _vacate(self, actor: ActorStatus) -> None:
        actor.handle = actor.pid = actor.node_id = actor.call = None
        actor.state = 0
        self._states.pop(actor.index, None)

    def _break(self, message: str) -> None:
        self._broken = message
        raise ClusterError(message)

    @property
    def _newest_state(self) -> int:
        return self._state.number if self._state else 0

    def _act(self) -> None:
        for actor in self._actors:  # before anything is handed out, for that depends on who is lost
            if self._next_step(actor, time.monotonic()) is Step.GIVE_UP:
                self._give_up(actor)
        for actor in self._actors:
            now = time.monotonic()
            step = self._next_step(actor, now)
            if step is Step.START:
                actor.handle = self._host.remote()
                actor.call = Call("start", actor.handle.start.remote(*self._recipe), now, self._start_timeout_s)
            elif step is Step.SET_STATE:
                assert (state := self._state) is not None
                ref = actor.handle.call.remote(state.method, *state.args)
                actor.call = Call("state", ref, now, state.timeout_s, state=state.number, version=state.version)
            elif step is Step.CHECK:
                actor.call = Call("check", actor.handle.check.remote(), now, _CHECK_TIMEOUT_S)
            elif step is Step.GIVE_TASK:
                task = self._queue.popleft()
                task.attempts += 1
                ref = actor.handle.call.remote(task.method, *task.args)
                actor.call = Call("task", ref, now, task.timeout_s, task=task)

    def _next_step(self, actor: ActorStatus, now: float) -> Step:
        return next_step(actor, newest_state=self._newest_state, has_task=bool(self._queue), now=now)

    def _give_up(self, actor: ActorStatus) -> None:
        call = actor.call
        assert call is not None
        if call.kind == "start" and not self._ever_started:
            self._break(
                f"none of {self.size} {self.name} actors has started within {call.timeout_s:g} s; see that the cluster "
                "has room for them, or allow more time"
            )
        what = {"start": "its start", "state": "its state call", "check": "a sign of life", "task": "its task"}
        self._lose(actor, "hung", f"{what[call.kind]} took more than {call.timeout_s:g} s")
