"""Held-out accuracy of published policies, measured by the rollout actors between their batches.

A run that samples ahead may take up a newer version while an older one is being evaluated; the answers then come from
both. Before the first iteration and after the last nothing newer comes, and in a synchronous run never.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.actor_pool import ActorPool, Done
from jobs.recipe_schema_rl import PPOSection


class EvaluationLoop:
    """Which versions are evaluated, and what is still under way of it. Driven by the rollout loop."""

    def __init__(
        self,
        settings: PPOSection,
        num_items: int,
        known: set[int],
        on_result: Callable[[int, list[tuple[int, bool]]], None],
    ) -> None:
        """``known``: versions that need no evaluation any more; ``on_result``: gets version and (problem, solved)s."""
        self.settings, self.num_items = settings, num_items
        self.known, self.on_result = known, on_result
        self.version = -1
        self._waiting: dict[int, list[int]] = {}  # call to problems
        self._found: list[tuple[int, bool]] = []
        self._calls = 0

    @property
    def is_busy(self) -> bool:
        """Whether answers are still to come."""
        return bool(self._waiting)

    def is_due(self, version: int) -> bool:
        """The first version, the last, and every so many between them, each once."""
        every = self.settings.evaluate_every
        wanted = version in (0, self.settings.iterations) or (every > 0 and version % every == 0)
        return wanted and version not in self.known and not self.is_busy

    def begin(self, version: int, pool: ActorPool) -> None:
        """Have a version evaluated if it is due."""
        if not self.is_due(version):
            return
        self.version, self._found = version, []
        share = -(-self.num_items // self.settings.rollout_workers)
        for first in range(0, self.num_items, share):
            self._submit([*range(first, min(first + share, self.num_items))], pool)

    def forget(self) -> None:
        """What was under way counts for nothing."""
        self._waiting.clear()

    def take(self, done: Done, pool: ActorPool) -> str | None:
        """Take in a finished call; why evaluation cannot go on, or None."""
        items = self._waiting.pop(done.key[1])
        if done.failure is not None:
            return f"evaluation failed: {done.failure.message}"
        if done.value is None:  # the actor has no weights yet
            self._submit(items, pool)
            return None
        self._found += done.value
        if not self._waiting:
            self.known.add(self.version)
            self.on_result(self.version, self._found)
        return None

    def _submit(self, items: list[int], pool: ActorPool) -> None:
        self._calls += 1
        self._waiting[self._calls] = items
        pool.submit(("evaluate", self._calls), "evaluate", items)
