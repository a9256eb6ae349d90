"""The place where learners and the driver of a run meet: batches one way, weights and news the other.

Neither knows the other's processes, so that either may die and come back. The learners, who have the training state,
say where they stand (``begin``); the driver answers with batches for that iteration and the following ones. Every
``begin`` opens a new generation: what was offered to an older one is dropped, and so is what an older one publishes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from cluster.errors import ClusterError
from cluster.nodes import on_this_node

_GRACE_S = 10.0  # for the way there and back, on top of what the caller waits
_KEPT_BATCHES = 2  # the one that the learners work on, and the next
_CONCURRENT_CALLS = 1000


class Stopped(RuntimeError):
    """The driver has stopped the exchange; ``reason`` is what it gave."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Begun:
    """News: a group of learners starts, or starts again, at iteration ``start``."""

    number: int
    generation: int
    start: int


@dataclass(frozen=True)
class Published:
    """News: weights (or whatever the ``payload`` holds) of ``version``.

    References in the payload belong to the learner that made them. When it dies they are lost, so fetch them with a
    timeout (``cluster.weights.fetch`` does), take a loss as not published, and wait for the next publication.
    """

    number: int
    generation: int
    version: int
    payload: Any


News = Begun | Published


class _Board:
    """The actor. Its methods answer (kind, value) with kind "ok", "stopped", "old" or "nothing" and never raise."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._stopped: str | None = None
        self._generation = 0
        self._number = 0
        self._published: Published | None = None  # keeps the references in the newest payload alive
        self._news: list[News] = []
        self._offers: dict[int, list[Any]] = {}

    async def begin(self, start: int) -> tuple[str, Any]:
        async with self._changed:
            if self._stopped is None:
                self._generation += 1
                self._number += 1
                self._offers.clear()
                self._news.append(Begun(self._number, self._generation, start))
                self._changed.notify_all()
            return self._answer(self._generation)

    async def offer(self, generation: int, iteration: int, held: list[Any]) -> tuple[str, Any]:
        async with self._changed:
            if self._stopped is None and generation == self._generation:
                self._offers[iteration] = held
                self._changed.notify_all()
                return self._answer(True)
            return self._answer(False)

    async def take(self, generation: int | None, iteration: int, timeout_s: float) -> tuple[str, Any]:
        def is_old() -> bool:
            return generation is not None and generation != self._generation

        async with self._changed:
            await self._wait_until(lambda: iteration in self._offers or is_old(), timeout_s)
            if is_old() and self._stopped is None:
                return "old", self._generation
            if iteration not in self._offers:
                return self._answer(None, "nothing")
            for older in [each for each in self._offers if each <= iteration - _KEPT_BATCHES]:
                del self._offers[older]
            return self._answer(self._offers[iteration])

    async def publish(self, generation: int | None, version: int, payload: Any) -> tuple[str, Any]:
        async with self._changed:
            if self._stopped is None and generation not in (None, self._generation):
                return "old", self._generation
            if self._stopped is None:
                self._number += 1
                self._published = Published(self._number, self._generation, version, payload)
                self._news.append(self._published)
                self._changed.notify_all()
            return self._answer(None)

    async def news(self, since: int, timeout_s: float) -> tuple[str, Any]:
        async with self._changed:
            self._news = [each for each in self._news if each.number > since]
            await self._wait_until(lambda: bool(self._news), timeout_s)
            return self._answer(list(self._news))

    async def stop(self, reason: str) -> tuple[str, Any]:
        async with self._changed:
            if self._stopped is None:
                self._stopped = reason
                self._offers.clear()
                self._news.clear()
                self._published = None
                self._changed.notify_all()
            return "ok", None

    def _answer(self, value: Any, kind: str = "ok") -> tuple[str, Any]:
        return (kind, value) if self._stopped is None else ("stopped", self._stopped)

    async def _wait_until(self, is_so: Callable[[], bool], timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):  # the caller looks for itself
            async with asyncio.timeout(timeout_s):
                await self._changed.wait_for(lambda: self._stopped is not None or is_so())


class Exchange:
    """A client of the exchange; may be sent to any process of the same Ray.

    Made by ``Exchange.start()``; the exchange lives in a process of its own, on no CPU of the cluster's, until
    ``close`` or the end of the process that started it. All methods raise Stopped once ``stop`` was called, and
    ClusterError when the exchange is gone or does not answer.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def start(cls) -> Exchange:
        """A new exchange."""
        options = {"num_cpus": 0, "max_concurrency": _CONCURRENT_CALLS, "scheduling_strategy": on_this_node()}
        return cls(ray.remote(_Board).options(**options).remote())

    def begin(self, start: int, timeout_s: float = 60.0) -> int:
        """A group of learners starts, or starts again, at iteration ``start``: the number of its generation.

        Called by rank 0 before any rank calls ``take``; everything offered before is dropped.
        """
        return self._call("begin to be noted", "begin", start, timeout_s=timeout_s)

    def take(self, iteration: int, timeout_s: float, *, generation: int | None = None) -> Any:
        """Reference to the batch of ``iteration``, once it is offered; every rank calls this.

        A batch stays here until one two iterations later is taken. With ``generation``, a learner of a group that was
        followed by another gets a ClusterError and not the other's batch.
        """
        what = f"the batch of iteration {iteration}"
        return self._call(what, "take", generation, iteration, timeout_s, timeout_s=timeout_s)[0]

    def publish(self, version: int, payload: Any, timeout_s: float = 60.0, *, generation: int | None = None) -> None:
        """Tell the driver of a new version. References inside the payload are kept alive while it is the newest.

        With ``generation``, a learner of a group that was followed by another gets a ClusterError.
        """
        what = f"version {version} to be published"
        self._call(what, "publish", generation, version, payload, timeout_s=timeout_s)

    def news(self, since: int, timeout_s: float = 0.0) -> list[News]:
        """What has happened after the news of number ``since``, in order; waits up to ``timeout_s`` for the first.

        For one reader: what it names as seen is dropped here. An empty list when nothing happens in time.
        """
        return self.read_news(self.ask_news(since, timeout_s), timeout_s)

    def ask_news(self, since: int, timeout_s: float) -> Any:
        """``news``, asked for now and read later: a reference that ``ray.wait`` or ``ActorPool.wait`` can wait for."""
        return self._actor.news.remote(since, timeout_s)

    def read_news(self, asked: Any, timeout_s: float) -> list[News]:
        """The answer to ``ask_news``, which was given ``timeout_s``."""
        return self._answer("news", asked, timeout_s)

    def offer(self, generation: int, iteration: int, batch: Any, timeout_s: float = 60.0) -> bool:
        """Offer the batch, a reference, to the learners of ``generation``; False (and dropped) if there is a newer."""
        # In a list the reference is passed on as it is; by itself Ray would send the object.
        return self._call(
            f"batch {iteration} to be offered", "offer", generation, iteration, [batch], timeout_s=timeout_s
        )

    def stop(self, reason: str, timeout_s: float = 60.0) -> None:
        """Everything that waits here, now and later, raises Stopped(reason). The first reason stays."""
        self._call("the exchange to stop", "stop", reason, timeout_s=timeout_s)

    def close(self) -> None:
        """End the exchange's process."""
        ray.kill(self._actor, no_restart=True)

    def _call(self, what: str, method: str, *args: Any, timeout_s: float) -> Any:
        return self._answer(what, getattr(self._actor, method).remote(*args), timeout_s)

    def _answer(self, what: str, asked: Any, timeout_s: float) -> Any:
        try:
            kind, value = ray.get(asked, timeout=timeout_s + _GRACE_S)
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"waited {timeout_s + _GRACE_S:g} s for {what}, and the exchange does not answer; "
                "see whether its node is overloaded or stopped, then start the run again"
            ) from error
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"waited for {what}, and the exchange is gone; its process or node has died: start the run again"
            ) from error
        if kind == "stopped":
            raise Stopped(value)
        if kind == "old":
            raise ClusterError(f"waited for {what}, but these learners were replaced: generation {value} has begun")
        if kind == "nothing":
            raise ClusterError(
                f"waited {timeout_s:g} s for {what} in vain; see the log of who should bring it, or allow more time"
            )
        return value
