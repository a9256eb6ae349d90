"""Bringing a buffer's entries to MLflow, from threads of its own, for as long as MLflow does not take them."""

import json
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.tracking_buffer import BUFFER, LANES, STATE, Buffer, Position
from cluster.tracking_client import REFUSED, batches, client_of, first_line, open_run, reason, refusal_named, set_tags
from cluster.tracking_entries import in_words, lane_of, num_rows, words
from cluster.tracking_uri import check_uri, shown

METRICS_PER_BATCH = 1000  # MLflow's own limit
TOGETHER = ("metrics", "tags")  # kinds of entries that are one request, as their order does not matter
FLUSH_SECONDS = 1.0  # metrics of this long go up together
LONGEST_PAUSE = 30.0  # between two tries at a server that does not take them
NO_PROGRESS_SECONDS = 60.0  # after which `send_rest` gives up


class Writers:
    """The two threads that empty a buffer, one for each lane."""

    def __init__(self, buffer: Buffer, client: Any, run_id: str):
        self._buffer = buffer
        self._lanes = [_Writer(buffer, lane, client, run_id) for lane in LANES]
        for writer in self._lanes:
            writer.start()

    def close(self, timeout_s: float) -> None:
        """Write the rest, for at most that long."""
        for writer in self._lanes:
            writer.closing.set()
        deadline = time.monotonic() + timeout_s
        for writer in self._lanes:
            writer.join(max(0.0, deadline - time.monotonic()))
        self.give_up()

    def close_patiently(self, without_progress_s: float) -> None:
        """Write the rest, for as long as something arrives every so many seconds."""
        for writer in self._lanes:
            writer.closing.set()
        while any(writer.is_alive() for writer in self._lanes):
            if time.monotonic() - max(writer.last_arrival for writer in self._lanes) > without_progress_s:
                break
            for writer in self._lanes:
                writer.join(0.2)
        self.give_up()

    def give_up(self) -> None:
        """Try nothing more."""
        for writer in self._lanes:
            writer.given_up.set()

    @property
    def refused(self) -> list[str]:
        """One line for each entry that MLflow will never take."""
        return [line for writer in self._lanes for line in writer.refused]

    @property
    def trouble(self) -> Exception | None:
        """Why MLflow has not taken what is left."""
        return next((writer.trouble for writer in self._lanes if writer.trouble), None)


class _Writer(threading.Thread):
    """Writes a lane's entries in their order, trying again what the server does not take for the moment."""

    def __init__(self, buffer: Buffer, lane: str, client: Any, run_id: str):
        super().__init__(name=f"mlflow-{lane}", daemon=True)
        self._buffer, self._lane, self._client, self._run_id = buffer, lane, client, run_id
        self.closing, self.given_up = threading.Event(), threading.Event()
        self.trouble: Exception | None = None
        self.refused: list[str] = []
        self.last_arrival = time.monotonic()
        self._may_be_there = True  # what is first in the lane may have arrived without our hearing of it

    def run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self.closing.wait(FLUSH_SECONDS)
            self._buffer.sync()
            try:
                while not self.given_up.is_set() and (waiting := self._buffer.waiting(self._lane, METRICS_PER_BATCH)):
                    together = list(takewhile(lambda item: item[0]["kind"] in TOGETHER, waiting))
                    self._bring(together or waiting[:1])
            except OSError as error:  # the buffer cannot be read for the moment
                self.trouble = error

    def _bring(self, group: list[tuple[dict[str, Any], Position]]) -> None:
        """Have MLflow take these, or refuse them for good; they stay in the buffer if neither comes to pass."""
        if self._deliver([entry for entry, _ in group]):
            self._buffer.sent(self._lane, group[-1][1])
            self.last_arrival = time.monotonic()

    def _deliver(self, entries: list[dict[str, Any]]) -> bool:
        pause = 0.5
        while not self.given_up.is_set():
            try:
                self._write(entries)
                self.trouble, self._may_be_there = None, False
                return True
            except Exception as error:  # whatever the client library raises, a run must not end for it
                self.trouble, self._may_be_there = error, True
                if isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in REFUSED:
                    if len(entries) == 1:
                        self.refused.append(f"{words(entries[0])}: {first_line(error)}")
                        self.trouble = None
                        return True
                    return all([self._deliver([entry]) for entry in entries])  # one bad name takes no other step along
            if self.closing.wait(pause):
                self.given_up.wait(0.5)
            pause = min(2 * pause, LONGEST_PAUSE)
        return False

    def _write(self, entries: list[dict[str, Any]]) -> None:
        """One entry of any kind, or several that go together."""
        from mlflow.entities import Metric

        first, client, run_id = entries[0], self._client, self._run_id
        match first["kind"]:
            case "metrics" | "tags":
                # MLflow's databases keep a metric of one name, step, time and value once: what is sent again, because
                # nobody knows whether it arrived, is not doubled. So the time is that of the entry.
                points = [
                    Metric(name, value, entry["time"], entry["step"])
                    for entry in entries
                    for name, value in entry.get("values", {}).items()
                ]
                for some in batches(points, METRICS_PER_BATCH):
                    client.log_batch(run_id, metrics=some)
                set_tags(client, run_id, {name: value for e in entries for name, value in e.get("tags", {}).items()})
            case "open":
                open_run(client, run_id, first["params"], first["tags"])
            case "end":
                if first["opened"] == self._buffer.state["opened"]:  # else the run has gone on since
                    client.set_terminated(run_id, first["status"], end_time=first["time"])
            case "file":
                inside = self._buffer.folder / first["path"]  # an absolute path stays as it is
                client.log_artifact(run_id, str(inside), first["folder"])
            case "reference":
                client.log_dict(run_id, first["content"], f"checkpoints/step-{first['step']:08d}.json")
            case "table":
                if not (self._may_be_there and self._rows_there(first["file"]) >= first["before"] + num_rows(first)):
                    client.log_table(run_id, first["columns"], first["file"])

    def _rows_there(self, file: str) -> int:
        """Rows of a table that MLflow has."""
        client, run_id = self._client, self._run_id
        if file not in [item.path for item in client.list_artifacts(run_id, os.path.dirname(file))]:
            return 0
        with tempfile.TemporaryDirectory(prefix="mmada-table-") as folder:
            return len(json.loads(Path(client.download_artifacts(run_id, file, folder)).read_text())["data"])


@dataclass
class Sent:
    """What became of the entries that a run had left: in words, "" for none, and what was refused line by line."""

    uri: str
    sent: str
    left: str
    refused: list[str] = field(default_factory=list)
    trouble: str = ""


def send_rest(run_dir: Path, uri: str | None = None, patience_s: float = NO_PROGRESS_SECONDS) -> list[Sent]:
    """Send what a run's buffer holds, and what those of MLflow runs that its folder had before hold.

    Args:
        run_dir: folder of the run, which must not be going on.
        uri: where the MLflow server is now; None for where the run was recorded.
        patience_s: give up when nothing has arrived for that long.

    Raises:
        ClusterError: the folder has no buffer, the run goes on, the server does not answer or does not know the run.
    """
    folders = [path.parent for path in sorted(Path(run_dir).glob(f"{BUFFER}*/{STATE}"))]
    if not folders:
        raise ClusterError(f"RUN_DIR={run_dir} holds nothing for MLflow; give the folder of a run, such as runs/NAME")
    return [_send_one(Buffer(folder), uri, patience_s) for folder in folders]


def _send_one(buffer: Buffer, uri: str | None, patience_s: float) -> Sent:
    buffer.open()
    try:
        run_id, place = buffer.state.get("run_id"), uri or buffer.state.get("uri", "")
        before = list(buffer.left())
        if not before or run_id is None:
            return Sent(shown(place), "", "")
        check_uri(place)
        with refusal_named(place, buffer.state["experiment"]):
            client = client_of(place)
            client.get_run(run_id)
        writers = Writers(buffer, client, run_id)
        writers.close_patiently(patience_s)
        left = list(buffer.left())
        trouble = reason(writers.trouble) if left else ""
        sent = [
            entry for lane in LANES for entry in _first_of(lane, before, left) if not _is_in(writers.refused, entry)
        ]
        return Sent(shown(place), in_words(sent), in_words(left), writers.refused, trouble)
    finally:
        buffer.close()


def _first_of(lane: str, before: list[dict[str, Any]], left: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A lane's entries that are gone: it is sent in its order."""
    own = [entry for entry in before if lane_of(entry) == lane]
    return own[: len(own) - sum(lane_of(entry) == lane for entry in left)]


def _is_in(refused: list[str], entry: dict[str, Any]) -> bool:
    return any(line.startswith(f"{words(entry)}:") for line in refused)
