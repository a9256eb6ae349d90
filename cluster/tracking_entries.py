"""The entries of a tracking buffer: what kinds there are, which steps they tell of, and how a person reads them.

{"kind": "metrics", "step": 3, "time": ms, "values": {"loss": 1.0}}
{"kind": "tags", "tags": {"stage": "second"}}
{"kind": "open", "opened": 2, "params": {...}, "tags": {...}}        the run was started or continued
{"kind": "end", "opened": 2, "status": "FINISHED", "time": ms}
{"kind": "file", "path": ..., "folder": "figures", "words": ...}     a file or folder; relative: in the buffer
{"kind": "reference", "step": 3, "content": {...}}                   where a checkpoint lies
{"kind": "table", "file": "tables/samples.json", "columns": {...}, "before": rows}
"""

from collections.abc import Iterable, Mapping
from typing import Any

FILE_KINDS = {"file", "reference", "table"}


def lane_of(entry: Mapping[str, Any]) -> str:
    """Which lane an entry waits in."""
    return "files" if entry["kind"] in FILE_KINDS else "records"


class Handed:
    """Which steps of which metrics have been handed over, and how many rows of which table.

    Steps are kept as runs of consecutive ones: a metric of every step costs two numbers.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None):
        saved = saved or {}
        self._steps: dict[str, list[list[int]]] = saved.get("steps", {})
        self._rows: dict[str, int] = saved.get("rows", {})

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take an entry in; one that is known changes nothing."""
        if entry["kind"] == "metrics":
            for name in entry["values"]:
                _add_step(self._steps.setdefault(name, []), entry["step"])
        elif entry["kind"] == "table":
            self._rows[entry["file"]] = max(self.rows(entry["file"]), entry["before"] + num_rows(entry))

    def steps(self, metric: str) -> set[int]:
        """Steps at which a metric was handed over."""
        return {step for first, last in self._steps.get(metric, ()) for step in range(first, last + 1)}

    def next_step(self, prefix: str) -> int:
        """The step behind all those of the metrics whose names begin so."""
        lasts = (runs[-1][1] for name, runs in self._steps.items() if name.startswith(prefix))
        return max(lasts, default=-1) + 1

    def rows(self, file: str) -> int:
        """Rows of a table that were handed over."""
        return self._rows.get(file, 0)

    def as_json(self) -> dict[str, Any]:
        """For the constructor."""
        return {"steps": self._steps, "rows": self._rows}


def _add_step(runs: list[list[int]], step: int) -> None:
    if not runs or step > runs[-1][1] + 1:
        runs.append([step, step])
    elif step == runs[-1][1] + 1:
        runs[-1][1] = step
    elif not any(first <= step <= last for first, last in runs):  # out of order, which is rare
        runs.append([step, step])
        runs.sort()


def num_rows(entry: Mapping[str, Any]) -> int:
    """Rows of a table's entry."""
    return len(next(iter(entry["columns"].values()), ()))


def words(entry: Mapping[str, Any]) -> str:
    """What an entry is, to a person."""
    kind = entry["kind"]
    if kind == "metrics":
        return f"metrics of step {entry['step']}"
    if kind == "file":
        return entry["words"]
    return {
        "tags": lambda: f"tags {', '.join(entry['tags'])}",
        "open": lambda: "the parameters",
        "end": lambda: f"the status {entry['status']}",
        "reference": lambda: f"checkpoint of step {entry['step']}",
        "table": lambda: f"rows of {entry['file']}",
    }[kind]()


def in_words(entries: Iterable[Mapping[str, Any]]) -> str:
    """Many entries in one line, each kind counted where there are several; "" for none."""
    steps: list[int] = []
    num_metrics, tags, end = 0, set(), ""
    others: dict[str, list[str]] = {}
    for entry in entries:
        if entry["kind"] == "metrics":
            num_metrics += len(entry["values"])
            steps = [min([entry["step"], *steps]), max([entry["step"], *steps])]
        elif entry["kind"] == "tags":
            tags |= set(entry["tags"])
        elif entry["kind"] == "end":
            end = words(entry)  # the last one holds
        else:
            others.setdefault(words(entry).partition(" ")[0], []).append(words(entry))
    parts = []
    if steps:
        when = f"step {steps[0]}" if steps[0] == steps[1] else f"steps {steps[0]} to {steps[1]}"
        parts.append(f"{_counted(num_metrics, 'metric')} of {when}")
    parts += [_counted(len(tags), "tag")] if tags else []
    for noun, names in others.items():
        names = list(dict.fromkeys(names))
        is_few = len(names) == 1 or noun not in _COUNTED
        parts.append(", ".join(names) if is_few else _counted(len(names), noun))
    return ", ".join([*parts, end] if end else parts)


_COUNTED = ("checkpoint", "figure", "artifact")  # the first words of names that become a number


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
