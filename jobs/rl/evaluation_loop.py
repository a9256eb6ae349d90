"""Held-out accuracy of published policies, measured by the rollout actors between their batches.

A version that the actors no longer have, as may happen in a run that samples ahead, is not evaluated. The last one
always is: nothing newer comes, and the run waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from cluster.actor_pool import ActorPool, Done
from jobs.recipe_schema_rl import PPOSection
from jobs.rl.messages import Evaluated


class EvaluationLoop:
    """Which versions are evaluated, and what is still under way of it. Driven by the rollout loop."""

    def __init__(
        self,
        settings: PPOSection,
        num_items: int,
        known: dict[int, float],
        on_result: Callable[[int, int], None],
    ) -> None:
        """``known``: accuracies by version, kept up to date here; ``on_result`` gets the version that has come to it,
        and of how many problems."""
        self.settings, self.num_items = settings, num_items
        self.known, self.on_result = known, on_result
        self.version = -1
        self._last_waits = False  # the last version, until an older one has been evaluated
        self._waiting: dict[int, list[int]] = {}  # call to problems
        self._found: list[tuple[int, bool]] = []
        self._calls = 0

    @property
    def is_busy(self) -> bool:
        """Whether answers are still to come."""
        return bool(self._waiting) or self._last_waits

    def is_due(self, version: int) -> bool:
        """The first version, the last, and every so many between them, each once."""
        every = self.settings.evaluate_every
        wanted = version in (0, self.settings.iterations) or (every > 0 and version % every == 0)
        return wanted and version not in self.known

    def begin(self, version: int, pool: ActorPool) -> None:
        """Have a version evaluated if it is due; while another one is, the last waits and others are passed over."""
        if not self.is_due(version):
            return
        if self._waiting:
            self._last_waits = version == self.settings.iterations
            return
        self._last_waits = False
        self.version, self._found = version, []
        share = -(-self.num_items // self.settings.rollout_workers)
        for first in range(0, self.num_items, share):
            self._submit([*range(first, min(first + share, self.num_items))], pool)

    def forget(self, start: int) -> None:
        """Learners begin again at version ``start``: what was under way, or measured of versions behind it, counts for
        nothing. Those to come are other policies, where sampling runs ahead or their number has changed."""
        self._waiting.clear()
        self._last_waits = False
        for version in [version for version in self.known if version > start]:
            del self.known[version]

    def take(self, done: Done, pool: ActorPool) -> str | None:
        """Take in a finished call; why evaluation cannot go on, or None."""
        items = self._waiting.pop(done.key[1], None)
        if items is None:  # of an evaluation that was given up
            return None
        if done.failure is not None:
            return f"evaluation failed: {done.failure.message}"
        found: Evaluated = done.value
        if found.version is None or found.version < self.version:  # the actor has not taken it up yet
            self._submit(items, pool)
            return None
        if found.version == self.version:
            self._found += found.answers
        else:
            self._waiting.clear()
        if not self._waiting:
            if found.version == self.version:
                self.known[self.version] = fmean(is_solved for _, is_solved in self._found)
                self.on_result(self.version, len(self._found))
            if self._last_waits:
                self.begin(self.settings.iterations, pool)
        return None

    def _submit(self, items: list[int], pool: ActorPool) -> None:
        self._calls += 1
        self._waiting[self._calls] = items
        pool.submit(("evaluate", self._calls), "evaluate", items, self.version)
