"""Keeping a run on workers going: start, look what failed, do what ``cluster.recovery`` decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.launch import RayLost, WorkersFailed
from cluster.nodes import Survey, survey
from cluster.recovery import Decision, Policy, Restart, Shrink, Status, Stop, Wait, decide

_LOOK_EVERY_S = 0.5
# What workers held is given back within a second or two of their end: such a wait is not worth a word.
_WORTH_A_WORD_S = 5.0


@dataclass(frozen=True)
class NodesLost:
    """Nodes that the cluster no longer has, or that do not answer, by their addresses."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Waiting:
    """There is not enough room; ``seconds`` more are waited for it. ``room``: workers that there is room for."""

    room: int
    seconds: float


Event = NodesLost | Waiting | Restart | Shrink


def lost_words(names: Sequence[str]) -> str:
    """``node 10.0.0.2 lost``."""
    return f"node{'s' * (len(names) > 1)} {', '.join(sorted(names))} lost"


def supervise(
    attempt: Callable[[int], None],
    policy: Policy,
    *,
    cpus_per_worker: float,
    gpus_per_worker: float,
    tell: Callable[[Event], None],
    while_waiting: Callable[[], None] = lambda: None,
) -> None:
    """``attempt(workers)`` until one of them comes to its end.

    The first is made with the largest of ``policy.sizes``, the others as ``decide`` says; ``tell`` gets what has
    happened and what follows from it, before it is done; ``while_waiting`` is called twice a second between attempts
    and may raise. Raises WorkersFailed: what the last attempt raised, or why there was none.
    """
    workers, failures = max(policy.sizes), 0
    while True:
        before = survey()
        try:
            return attempt(workers)
        except RayLost:
            raise
        except WorkersFailed as error:
            failures += 1
            if error.is_final:
                raise
            recovery = _Recovery(policy, before, cpus_per_worker, gpus_per_worker, tell, while_waiting)
            decision = recovery.settle(failures, workers)
            if isinstance(decision, Stop):
                if decision.reason is None:
                    raise
                cause = lost_words([*recovery.lost.values()]) if recovery.lost else str(error)
                raise WorkersFailed(f"{cause}; {decision.reason}") from error
        tell(decision)
        workers = decision.workers


class _Recovery:
    """The time between a failure and what is done about it."""

    def __init__(
        self,
        policy: Policy,
        before: Survey,
        cpus_per_worker: float,
        gpus_per_worker: float,
        tell: Callable[[Event], None],
        while_waiting: Callable[[], None],
    ) -> None:
        self.policy, self.before, self.tell, self.while_waiting = policy, before, tell, while_waiting
        self.per_worker = cpus_per_worker, gpus_per_worker
        self.lost: dict[str, str] = {}  # by Ray's ids
        self.has_told_of_waiting = False

    def settle(self, failures: int, workers: int) -> Restart | Shrink | Stop:
        """Look until the decision is another than to wait."""
        failed_at = time.monotonic()
        while True:
            now, waited_s = survey(), time.monotonic() - failed_at
            self._tell_of_losses(now)
            room = now.room(*self.per_worker)
            decision: Decision = decide(Status(failures, workers, room, bool(now.silent), waited_s), self.policy)
            if not isinstance(decision, Wait):
                return decision
            is_worth_a_word = self.lost or waited_s > _WORTH_A_WORD_S
            if room < workers and is_worth_a_word and not self.has_told_of_waiting:
                self.has_told_of_waiting = True
                self.tell(Waiting(room, self.policy.timeout_s - waited_s))
            self.while_waiting()
            time.sleep(_LOOK_EVERY_S)

    def _tell_of_losses(self, now: Survey) -> None:
        gone = {node: name for node, name in self.before.answering.items() if node not in now.answering}
        new = [name for node, name in gone.items() if node not in self.lost]
        if new:
            self.lost |= gone
            self.tell(NodesLost(tuple(sorted(new))))
