"""What to do when a run's workers have failed. Computes only; ``cluster.supervision`` looks and acts."""

from __future__ import annotations

from dataclasses import dataclass

# By then what the failed workers held has been given back, and room is what it is.
SETTLED_S = 3.0


@dataclass(frozen=True)
class Status:
    """How things stand after a failure."""

    failures: int
    """Failures of the group of workers so far, this one included."""

    workers: int
    """Size of the group that failed."""

    room: int
    """Workers that the nodes which answer have room for now."""

    in_doubt: bool = False
    """Some node does not answer, and Ray has not given it up yet."""

    waited_s: float = 0.0
    """Seconds since the failure."""


@dataclass(frozen=True)
class Policy:
    """What the user allows."""

    max_failures: int
    """Failures after which the run goes on."""

    sizes: tuple[int, ...]
    """Numbers of workers that it may go on with; the largest is the one that is wanted."""

    timeout_s: float = 0.0
    """Seconds to wait for room, before it goes on with fewer workers or ends."""

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes} allows no workers at all")


@dataclass(frozen=True)
class Restart:
    """Go on from the last checkpoint with as many workers as before, or with more again."""

    workers: int


@dataclass(frozen=True)
class Shrink:
    """Go on from the last checkpoint with fewer workers."""

    workers: int


@dataclass(frozen=True)
class Wait:
    """Look again: a node may come back, or Ray may notice that it will not."""


@dataclass(frozen=True)
class Stop:
    """End the run; ``reason`` is why where it is not the failure itself."""

    reason: str | None = None


Decision = Restart | Shrink | Wait | Stop


def decide(status: Status, policy: Policy) -> Decision:
    """What follows from how things stand; the rules in the order in which they hold.

    1. A run that has failed too often ends.
    2. While it is in doubt whether a node is there, nothing is started that might be placed on it.
    3. Where all workers have room, all of them start again, also after a time with fewer.
    4. As many as failed, or more, start again when it is certain that there is no room for all.
    5. Fewer than failed are not taken before the time for a node to come back is over; then as many as there is room
       for, out of the numbers that are allowed.
    """
    wanted = max(policy.sizes)
    has_time = status.waited_s < policy.timeout_s
    if status.failures > policy.max_failures:
        return Stop()
    if status.in_doubt and has_time:
        return Wait()
    fitting = [size for size in policy.sizes if size <= status.room]
    if wanted in fitting or (fitting and max(fitting) >= status.workers and status.waited_s >= SETTLED_S):
        return Restart(max(fitting))
    if has_time or status.waited_s < SETTLED_S:
        return Wait()
    if fitting:
        return Shrink(max(fitting))
    least = min(policy.sizes)
    return Stop(
        f"there is room for {status.room} of cluster.workers={wanted}"
        + (f" and cluster.min_workers leaves none below {least}" if least < wanted else "")
        + f", also after cluster.node_timeout={policy.timeout_s:g} s; add nodes and go on with run.resume=true"
        + (", there with fewer cluster.workers" if status.room else "")
    )
