"""What a run says when workers or nodes were lost and it goes on."""

from __future__ import annotations

from cluster.recovery import Restart, Shrink
from cluster.supervision import Event, NodesLost, Waiting, lost_words


def counted(count: int, name: str) -> str:
    """``1 worker``, ``2 workers``."""
    return f"{count} {name}{'s' * (count != 1)}"


class Setbacks:
    """Puts events into words, and keeps those of the newest setback for MLflow.

    ``wanted``: workers that the recipe asks for; ``before``: times that the run has been gone on with already.
    """

    def __init__(self, wanted: int, before: int) -> None:
        self.wanted, self.restarts = wanted, before
        self.workers = wanted
        self._words: list[str] = []

    def words(self, event: Event) -> str:
        """The event as a line; a decision to go on counts as a restart."""
        if isinstance(event, Waiting):
            return (
                f"there is room for {event.room} of {counted(self.wanted, 'worker')}; waiting up to "
                f"{event.seconds:.0f} s for another node"
            )
        if isinstance(event, NodesLost):
            line = lost_words(event.nodes)
        else:
            instead = f" instead of {self.workers}" if event.workers != self.workers else ""
            line = f"going on with {counted(event.workers, 'worker')}{instead}"
            self.restarts, self.workers = self.restarts + 1, event.workers
        self._words.append(line)
        return line

    def tags(self, event: Event) -> dict[str, object]:
        """For MLflow, once the run goes on: how often, with how many workers, and why."""
        if not isinstance(event, Restart | Shrink):
            return {}
        found = {"restarts": self.restarts, "workers": self.workers, f"restart.{self.restarts}": "; ".join(self._words)}
        self._words = []
        return found
