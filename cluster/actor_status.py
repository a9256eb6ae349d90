"""What a pool of actors knows of each of them, and what it does next with it: decided here, without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal

CallKind = Literal["start", "state", "check", "task"]
FailureKind = Literal["raised", "died", "hung", "lost"]
EventKind = Literal["died", "hung", "replaced", "retried"]

CHECK_EVERY_S = 10.0  # an idle actor is asked this often whether it is still there
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True)
class Failure:
    """Why a task has no value.

    ``kind`` is "raised" (by the method; ``message`` is the last line of what it said), "died" (with the last actor
    that tried), "hung" (no result in time) or "lost" (an argument's object is gone, with the process that owned it).
    ``attempts`` counts the actors that tried.
    """

    kind: FailureKind
    message: str
    attempts: int


@dataclass(frozen=True)
class Done:
    """A finished task: its ``value``, or its ``failure``.

    ``actor`` is the index of the actor that had it last, ``seconds`` the time spent in its method (of a failure: since
    that actor was given the task).
    """

    key: Any
    value: Any
    failure: Failure | None
    actor: int
    seconds: float


@dataclass(frozen=True)
class PoolEvent:
    """What the owner of a pool may want to say or count.

    "died" and "hung": an actor is lost, ``lost_seconds`` is how long it had been at a task that is wanted. "replaced":
    its successor is ready, the newest state included, ``seconds`` after the loss was found. "retried": the task
    ``key`` waits for another try; ``lost_seconds`` is what it took to raise, so that those of all events add up.
    """

    kind: EventKind
    actor: int
    reason: str
    seconds: float = 0.0
    lost_seconds: float = 0.0
    key: Any = None


@dataclass
class Task:
    """A call wanted by the owner of the pool; ``attempts`` counts the actors that were given it."""

    key: Any
    method: str
    args: tuple[Any, ...]
    timeout_s: float
    attempts: int = 0


@dataclass
class Call:
    """What an actor is at: ``ref`` is the result to come. A task that was forgotten is None.

    ``state`` and ``version`` are those of a state call.
    """

    kind: CallKind
    ref: Any
    since: float
    timeout_s: float
    task: Task | None = None
    state: int = 0
    version: int = 0


@dataclass
class ActorStatus:
    """One place in the pool, whoever fills it.

    ``handle`` is None while nobody does; a new actor may then be made from ``not_before`` on. ``state`` is the number
    of the newest state call that it has run (0: none). ``suspect``: others have died since it was last heard of.
    ``lost_at`` is when its predecessor's loss was found; None once it stands in for it. ``lost_in_a_row`` counts actors
    lost here since the pool finished a task, ``lost_since_own`` since this place did.
    """

    index: int
    handle: Any = None
    pid: int | None = None
    node_id: str | None = None
    call: Call | None = None
    state: int = 0
    suspect: bool = False
    idle_since: float = 0.0
    not_before: float = 0.0
    lost_at: float | None = None
    lost_in_a_row: int = 0
    lost_since_own: int = 0

    @property
    def is_started(self) -> bool:
        """Its constructor has returned."""
        return self.handle is not None and self.pid is not None


class Step(Enum):
    """What to do with an actor now."""

    WAIT = auto()
    START = auto()
    SET_STATE = auto()
    CHECK = auto()
    GIVE_TASK = auto()
    GIVE_UP = auto()


def next_step(actor: ActorStatus, *, newest_state: int, has_task: bool, now: float) -> Step:
    """What to do with one actor, given whether a task waits and the number of the newest state call (0: none)."""
    if actor.handle is None:
        return Step.START if now >= actor.not_before else Step.WAIT
    if actor.call is not None:
        return Step.GIVE_UP if now - actor.call.since >= actor.call.timeout_s else Step.WAIT
    if actor.state != newest_state:
        return Step.SET_STATE
    # A task on an actor that died unnoticed counts as an attempt: when many die at once, as with their node, a task
    # would use up its attempts on the dead.
    if actor.suspect:
        return Step.CHECK
    if has_task:
        return Step.GIVE_TASK
    return Step.CHECK if now - actor.idle_since >= CHECK_EVERY_S else Step.WAIT


def next_time(actor: ActorStatus) -> float:
    """When ``next_step`` may say something else although nothing was heard."""
    if actor.handle is None:
        return actor.not_before
    if actor.call is not None:
        return actor.call.since + actor.call.timeout_s
    return actor.idle_since + CHECK_EVERY_S


def pause_before(lost_since_own: int) -> float:
    """Seconds to wait before an actor is replaced: none the first time, then doubling up to half a minute."""
    return 0.0 if lost_since_own <= 1 else min(_FIRST_PAUSE_S * 2 ** min(lost_since_own - 2, 16), _LONGEST_PAUSE_S)
