"""The prompt ledger: which prompts were drawn, sampled, trained on or dropped, and why.

Two files in the run's ``logs``, each with one writer and one JSON object per line, never changed, only added to:
``ledger.jsonl`` by the driver (drawn, sampled, dropped) and ``trained.jsonl`` by the first learner. Whoever begins
again at an earlier iteration says so, and what it does then counts instead. ``entries`` reads both as they stand.

A trajectory's name is its iteration, the prompt's place in the batch (slot), and which of its samples it is.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DRIVER_FILE, LEARNER_FILE = "logs/ledger.jsonl", "logs/trained.jsonl"
SAVED_FILE = "ledger.jsonl"  # in a checkpoint


class LedgerFile:
    """One of the two files, for its writer. Every line is on disk when the call returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)
        self._file.write("\n")  # ends the line that a killed writer may have left half written

    def write(self, event: str, **values: Any) -> None:
        """Add one line."""
        self._file.write(json.dumps({"event": event, **values}) + "\n")

    def close(self) -> None:
        """Nothing more will be written."""
        self._file.close()


@dataclass
class Entry:
    """What became of one iteration. ``prompts``: the problem in each slot; trajectories are (slot, sample).

    ``versions``: which version of the policy sampled a trajectory; ``dropped``: why one was not trained on.
    """

    iteration: int
    generation: int
    prompts: list[int]
    samples: int
    versions: dict[tuple[int, int], int] = field(default_factory=dict)
    dropped: dict[tuple[int, int], str] = field(default_factory=dict)
    trained: list[tuple[int, int]] | None = None

    @property
    def lost(self) -> list[tuple[int, int]]:
        """Trajectories of a trained iteration that were neither trained on nor dropped."""
        known = {*(self.trained or ()), *self.dropped}
        wanted = [(slot, sample) for slot in range(len(self.prompts)) for sample in range(self.samples)]
        return [each for each in wanted if each not in known]

    @property
    def doubled(self) -> list[tuple[int, int]]:
        """Trajectories that were trained on twice, as when their iteration was, or trained on and dropped."""
        counts = Counter([*(self.trained or ()), *self.dropped])
        return [each for each, count in counts.items() if count > 1]

    def as_line(self) -> str:
        """For a checkpoint."""
        return json.dumps(
            {
                "event": "restored",
                "iteration": self.iteration,
                "generation": self.generation,
                "prompts": self.prompts,
                "samples": self.samples,
                "versions": [[*each, version] for each, version in self.versions.items()],
                "dropped": [[*each, reason] for each, reason in self.dropped.items()],
                "trained": self.trained,
            }
        )


def entries(run_dir: Path) -> list[Entry]:
    """What became of every iteration that has been trained, in order; what was begun again counts as done last."""
    drawn: dict[tuple[int, int], Entry] = {}
    for line in _lines(run_dir / DRIVER_FILE):
        key = (line.get("generation", 0), line.get("iteration", 0))
        if line["event"] == "drawn":
            drawn[key] = Entry(line["iteration"], line["generation"], line["prompts"], line["samples"])
        elif line["event"] == "sampled":
            drawn[key].versions |= {(line["slot"], k): version for k, version in enumerate(line["versions"])}
        elif line["event"] == "dropped":
            drawn[key].dropped[line["slot"], line["sample"]] = line["reason"]
    trained: dict[int, Entry] = {}
    for line in _lines(run_dir / LEARNER_FILE):
        if line["event"] == "begin":
            trained = {iteration: entry for iteration, entry in trained.items() if iteration < line["start"]}
        elif line["event"] == "restored":
            trained[line["iteration"]] = _restored(line)
        else:
            entry, before = drawn[line["generation"], line["iteration"]], trained.get(line["iteration"])
            again = [] if before is None else before.trained or []  # without a beginning in between: learned twice
            entry.trained = [*again, *((slot, sample) for slot, sample in line["trajectories"])]
            trained[line["iteration"]] = entry
    return [trained[iteration] for iteration in sorted(trained)]


def ledger_totals(found: list[Entry]) -> dict[str, int]:
    """What became of all trajectories of ``entries``, and how many iterations before the last were never trained."""
    known = {entry.iteration for entry in found}
    return {
        "trained": sum(len({*(entry.trained or ())}) for entry in found),
        "dropped": sum(len(entry.dropped) for entry in found),
        "lost": sum(len(entry.lost) for entry in found),
        "doubled": sum(len(entry.doubled) for entry in found),
        "skipped_iterations": max(known, default=-1) + 1 - len(known),
    }


def copy_for_checkpoint(run_dir: Path, iterations: int, target: Path) -> None:
    """Write what became of the first ``iterations``."""
    target.write_text("".join(entry.as_line() + "\n" for entry in entries(run_dir) if entry.iteration < iterations))


def restore(run_dir: Path, saved: Path, iterations: int, file: LedgerFile) -> None:
    """Give the run's own ledger what it lacks of the first ``iterations`` from a checkpoint's copy.

    ``file`` is the learner's. Nothing is added where the run's folder still has it all.
    """
    known = {entry.iteration for entry in entries(run_dir)}
    for line in _lines(saved):
        if line["iteration"] < iterations and line["iteration"] not in known:
            file.write(**line)


def _restored(line: dict[str, Any]) -> Entry:
    return Entry(
        line["iteration"],
        line["generation"],
        line["prompts"],
        line["samples"],
        {(slot, sample): version for slot, sample, version in line["versions"]},
        {(slot, sample): reason for slot, sample, reason in line["dropped"]},
        [(slot, sample) for slot, sample in line["trained"]],
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # a line that a killed writer did not finish
            found.append(json.loads(text))
    return found
