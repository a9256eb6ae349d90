"""What is known of a sweep's trials, on disk at every event: ``sweep.json`` in its folder.

Ray Tune has names of its own for trials and forgets some of what it had heard when its driver dies. Here a trial has
a number, which stays, and all that was measured of it.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BOOK = "sweep.json"
# Waiting for another driver to take them up; running; paused by the scheduler; ended.
WAITING, RUNNING, PAUSED, ENDED = "waiting", "running", "paused", ("done", "stopped", "failed")


@dataclass
class TrialEntry:
    """One trial. ``settings``: those it runs with; ``earlier``: those it had before, with the step they ended at.

    ``values``: the metric by step. ``seconds``: spent running, all starts together.
    """

    number: int
    tune_id: str
    settings: dict[str, Any]
    status: str = RUNNING
    step: int = 0
    values: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    mlflow_run_id: str | None = None
    checkpoint: str | None = None
    earlier: list[dict[str, Any]] = field(default_factory=list)

    @property
    def value(self) -> float | None:
        """The newest."""
        return self.values[max(self.values)] if self.values else None

    @property
    def name(self) -> str:
        """``trial-0003``; its folder's name and MLflow's."""
        return trial_name(self.number)


def trial_name(number: int) -> str:
    """``trial-0003``."""
    return f"trial-{number:04d}"


class Book:
    """All trials by number. ``identity`` tells this sweep from all others, in MLflow too."""

    def __init__(self, sweep_dir: Path) -> None:
        self.path = sweep_dir / BOOK
        self.identity = uuid.uuid4().hex
        self.trials: dict[int, TrialEntry] = {}
        self._since: dict[int, float] = {}  # when a running one was started
        if self.path.exists():
            self.identity, self.trials = read_book(sweep_dir)
            for entry in self.trials.values():
                entry.status = entry.status if entry.status in ENDED else WAITING
        else:
            self.write()

    def start(self, tune_id: str, settings: dict[str, Any]) -> TrialEntry:
        """The trial runs, for the first time or again. Settings that have changed are another trial's, taken over."""
        entry = self.find(tune_id) or self._orphan(settings)
        if entry is None:
            entry = TrialEntry(self._new_number(tune_id), tune_id, settings)
            self.trials[entry.number] = entry
        if entry.status in ENDED and entry.settings == settings:  # its driver died before Tune had written that down
            entry.tune_id = tune_id
            self.write()
            return entry
        if entry.settings != settings:
            entry.earlier.append({"until": entry.step, "settings": entry.settings})
            entry.settings = settings
        entry.tune_id, entry.status, entry.error = tune_id, RUNNING, None
        self._since[entry.number] = time.monotonic()
        self.write()
        return entry

    def report(self, tune_id: str, report: dict[str, Any], metric: str) -> TrialEntry:
        """An evaluation, or a trial's own last word."""
        entry = self.trials[self._number(tune_id)]
        if self._is_over(entry):
            return entry
        self._count_seconds(entry)
        entry.step = report.get("step", entry.step)
        if report.get(metric) is not None:
            entry.values[entry.step] = report[metric]
        for name in ("mlflow_run_id", "checkpoint", "error"):
            setattr(entry, name, report.get(name) or getattr(entry, name))
        if report.get("status") in ENDED:
            entry.status = report["status"]
        elif report.get("done") and report.get("error"):
            entry.status = "failed"
        self.write()
        return entry

    def pause(self, tune_ids: set[str]) -> None:
        """These have no process now; those that had none and are not among them run again."""
        for entry in self.with_status(RUNNING, PAUSED):
            entry.status = PAUSED if entry.tune_id in tune_ids else RUNNING
        self.write()

    def end(self, tune_id: str, error: str | None) -> TrialEntry:
        """It will not run again; what has not said so itself was stopped."""
        entry = self.trials[self._number(tune_id)]
        if self._is_over(entry):
            return entry
        self._count_seconds(entry)
        self._since.pop(entry.number, None)
        if entry.status in (RUNNING, PAUSED):
            entry.status, entry.error = ("failed", error) if error else ("stopped", None)
        self.write()
        return entry

    def find(self, tune_id: str) -> TrialEntry | None:
        """The trial that Tune calls so."""
        return next((entry for entry in self.trials.values() if entry.tune_id == tune_id), None)

    def with_status(self, *statuses: str) -> list[TrialEntry]:
        """Trials of these statuses, by number."""
        return [entry for _, entry in sorted(self.trials.items()) if entry.status in statuses]

    def best(self, mode: str) -> TrialEntry | None:
        """The best among those that came to their end."""
        done = [entry for entry in self.with_status("done") if entry.value is not None]
        sign = 1 if mode == "min" else -1
        return min(done, key=lambda entry: (sign * (entry.value or 0.0), entry.number), default=None)

    def write(self) -> None:
        """To disk, as a whole."""
        trials = [asdict(entry) for _, entry in sorted(self.trials.items())]
        aside = self.path.with_suffix(".aside")
        aside.write_text(json.dumps({"identity": self.identity, "trials": trials}, indent=1))
        aside.replace(self.path)

    def _is_over(self, entry: TrialEntry) -> bool:
        """It had ended before this driver began, whatever Tune has it do again."""
        return entry.status in ENDED and entry.number not in self._since

    def _number(self, tune_id: str) -> int:
        entry = self.find(tune_id)
        assert entry is not None, f"{tune_id} reports before it has started"
        return entry.number

    def _new_number(self, tune_id: str) -> int:
        """The place in which Tune drew it, so that the same seed gives the same numbers; else the next one."""
        place = re.search(r"_(\d{5})$", tune_id)
        number = int(place[1]) + 1 if place else 0
        return number if number and number not in self.trials else max(self.trials, default=0) + 1

    def _orphan(self, settings: dict[str, Any]) -> TrialEntry | None:
        """One that an earlier driver had started and Tune, which was killed before it wrote that down, draws anew."""
        return next((each for each in self.with_status(WAITING) if each.settings == settings), None)

    def _count_seconds(self, entry: TrialEntry) -> None:
        now = time.monotonic()
        entry.seconds += now - self._since.get(entry.number, now)
        self._since[entry.number] = now


def read_book(sweep_dir: Path) -> tuple[str, dict[int, TrialEntry]]:
    """The identity and the trials that a sweep's folder holds."""
    found = json.loads((sweep_dir / BOOK).read_text())
    trials = [TrialEntry(**each) for each in found["trials"]]
    for entry in trials:
        entry.values = {int(step): value for step, value in entry.values.items()}
    return found["identity"], {entry.number: entry for entry in trials}
