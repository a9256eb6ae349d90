"""One trial of a search, as Ray Tune's actor: work in a thread, its reports handed over one by one.

Tune asks the actor for the next report and tells it to save, to stop and to load. The work is never held up by that:
what it reports waits here until Tune asks.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

POINTER = "pointer.json"
_STOP_TIMEOUT_S = 60.0


class Channel:
    """What passes between a trial's work and Tune.

    ``trial``: Tune's name for it. ``stop``: set when the work shall end soon. ``pointer``: plain values that say where
    the newest checkpoint of the work lies; Tune carries them from trial to trial, the work itself carries what they
    point to. ``restored``: the pointer that this trial begins from, its own after a pause, another's in
    population-based training, or None.
    """

    def __init__(self, trial: str) -> None:
        self.trial = trial
        self.stop = threading.Event()
        self.restored: dict[str, Any] | None = None
        self.pointer: dict[str, Any] = {}
        self.reports: queue.Queue[tuple[dict[str, Any], dict[str, Any]]] = queue.Queue()

    def report(self, report: dict[str, Any]) -> None:
        """Hand Tune an evaluation: the metric that it looks at, and ``step``."""
        self.reports.put((report, dict(self.pointer)))


TrialWork = Callable[[dict[str, Any], dict[str, Any], Channel], dict[str, Any]]


class TrialActor(tune.Trainable):
    """Runs ``work(drawn, work_config, channel)``; what that returns is the trial's last report."""

    work: TrialWork
    work_config: dict[str, Any]

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing yet: a pointer may follow before the first step."""
        self._channel = Channel(self.trial_id)
        self._thread: threading.Thread | None = None
        self._reported: dict[str, Any] = {}  # the pointer at the report that Tune has seen

    def step(self) -> dict[str, Any]:
        """The next report, as soon as there is one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mmada-trial", daemon=True)
            self._thread.start()
        report, self._reported = self._channel.reports.get()
        return report

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Where the checkpoint of the report that Tune has seen lies."""
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps(self._reported))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Begin from what another trial, or this one before a pause, has saved."""
        self._channel.restored = json.loads((Path(checkpoint) / POINTER).read_text()) or None

    def cleanup(self) -> None:
        """Let the work come to an orderly end. All that it started dies with this process."""
        self._channel.stop.set()
        if self._thread is not None:
            self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            last = type(self).work(self.config, type(self).work_config, self._channel)
        except BaseException as error:  # the thread's end: whatever it is, the trial has failed by it
            last = {"error": f"{type(error).__name__}: {error}"}
        self._channel.report({**last, "done": True})
