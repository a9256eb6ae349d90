"""What a run has to say to MLflow, on disk from when it is said until MLflow has it.

A folder of the run holds lines of JSON in numbered segments; a line is one entry, such as the metrics of a step. Two
lanes read them, each in order and at its own pace: `records` (metrics, tags, the status) and `files`, so that a
picture that is not taken holds no number up. A segment that both lanes have read is deleted. What has been handed
over remains known in a summary, so that a run that goes on while its server is away says nothing twice.

Nothing in here speaks to MLflow.
"""

import fcntl
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.tracking_entries import Handed, lane_of

BUFFER = "mlflow-buffer"  # inside the run's folder
LANES = ("records", "files")
SEGMENT_BYTES = 1 << 20
STATE, SENT, HANDED, LOCK, FILES = "state.json", "sent.json", "handed.json", "lock", "files"

Position = tuple[int, int]  # segment's number, bytes into it

logger = logging.getLogger(__name__)


class Buffer:
    """The entries of one run. Methods may be called by several threads.

    `state` is what is known of the run itself: `uri`, `experiment` and `run_id` of MLflow, how often it was `opened`,
    and whether the buffer is `whole`, there since the run was created.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder).absolute()
        self.state: dict[str, Any] = {}
        self.handed = Handed()
        self.trouble: OSError | None = None  # why entries are held in memory
        self._lock = threading.RLock()
        self._segment, self._size = 1, 0  # the one that is written to
        self._file = -1
        self._held: bytearray | None = None  # its bytes, where the disk does not take them
        self._is_synced = True
        self._sent: dict[str, Position] = {}
        self._guard = -1

    def open(self) -> None:
        """Read what an earlier process left, and keep others out.

        Raises:
            ClusterError: another process has it open.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep_others_out()
        self.state = read_json(self.folder / STATE)
        self.handed = Handed(read_json(self.folder / HANDED))
        numbers = sorted(int(path.stem) for path in self.folder.glob("*.jsonl") if path.stem.isdecimal())
        sent = {lane: (int(place[0]), int(place[1])) for lane, place in read_json(self.folder / SENT).items()}
        first: Position = (numbers[0], 0) if numbers else max(sent.values(), default=(1, 0))
        self._sent = {lane: max(sent.get(lane, first), first) for lane in LANES}
        self._segment = numbers[-1] if numbers else max(self._sent.values())[0]
        for number in numbers:
            self._size = _mend(self._path(number))
            for entry, _ in self._entries((number, 0), number):
                self.handed.add(entry)
        # Positions are not flushed to disk with the lines: after a power cut they may lie behind the lines' end.
        self._sent = {lane: min(place, (self._segment, self._size)) for lane, place in self._sent.items()}

    def remember(self, **values: Any) -> None:
        """Add to `state`, on disk at once."""
        self.state |= values
        write_json(self.folder / STATE, self.state)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Keep an entry. Returns at once; should the disk not take it, it is held in memory."""
        line = (json.dumps(entry, default=str) + "\n").encode()
        with self._lock:
            if self._size >= SEGMENT_BYTES:
                self._next_segment()
            self.handed.add(entry)
            self._write(line)
            self._size += len(line)
            self._is_synced = False

    def sync(self) -> None:
        """Have the disk keep what has been appended, also through a power cut."""
        with self._lock:
            file = os.dup(self._file) if self._file >= 0 and not self._is_synced else -1
            self._is_synced = True
        if file >= 0:
            try:
                os.fsync(file)
            except OSError as error:
                self.trouble = error
            finally:
                os.close(file)

    def waiting(self, lane: str, limit: int) -> list[tuple[dict[str, Any], Position]]:
        """The first entries of a lane that are not sent, at most `limit`, each with the position behind it."""
        with self._lock:
            found: list[tuple[dict[str, Any], Position]] = []
            end = self._sent[lane]
            for entry, end in self._entries(self._sent[lane], self._segment):
                if lane_of(entry) == lane:
                    found.append((entry, end))
                    if len(found) == limit:
                        break
            if not found and end != self._sent[lane]:
                self._sent[lane] = end  # nothing but entries of the other lane
            return found

    def sent(self, lane: str, position: Position) -> None:
        """All entries of a lane before `position` are with MLflow."""
        with self._lock:
            if self._guard < 0:
                return  # closed meanwhile; it is sent again, which MLflow recognises
            self._sent[lane] = position
            try:
                write_json(self.folder / SENT, self._sent)
                self._delete_before(min(self._sent.values())[0])
            except OSError as error:  # they are sent again after a restart
                self.trouble = error

    def left(self) -> Iterator[dict[str, Any]]:
        """All entries that are not sent."""
        return self._unsent((0, 0))

    def is_empty(self) -> bool:
        """Whether everything is sent."""
        return next(self.left(), None) is None

    def keep_file(self, source: Path, name: str) -> str:
        """Copy a file or folder in, for an entry that is to follow; its path relative to the buffer's folder.

        Raises:
            OSError: the disk does not take it.
        """
        with self._lock:
            target = self.folder / FILES / name
            aside = target.with_name(target.name + ".partial")
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
                shutil.copytree(source, aside)
                shutil.rmtree(target, ignore_errors=True)
            else:
                shutil.copy2(source, aside)
            aside.replace(target)
            return str(target.relative_to(self.folder))

    def close(self) -> int:
        """Let others in; the number of entries that are in memory alone and so are lost."""
        with self._lock:
            if self._guard < 0:
                return 0
            lost = 0
            try:
                if self._held is not None:
                    self._to_disk()
                self.sync()
                if self.is_empty():
                    self._tidy()
            except OSError as error:
                self.trouble = error
                lost = len(list(self._unsent((self._segment, 0)))) if self._held else 0
            if self._file >= 0:
                os.close(self._file)
            os.close(self._guard)
            self._file = self._guard = -1
            return lost

    def _unsent(self, start: Position) -> Iterator[dict[str, Any]]:
        with self._lock:
            for lane in LANES:
                for entry, _ in self._entries(max(start, self._sent[lane]), self._segment):
                    if lane_of(entry) == lane:
                        yield entry

    def _tidy(self) -> None:
        """Delete every segment and file: all is sent."""
        self._sent = dict.fromkeys(LANES, (self._segment + 1, 0))
        write_json(self.folder / HANDED, self.handed.as_json())
        write_json(self.folder / SENT, self._sent)
        for path in self.folder.glob("*.jsonl"):
            path.unlink()
        shutil.rmtree(self.folder / FILES, ignore_errors=True)

    def _keep_others_out(self) -> None:
        self._guard = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._guard, 20, 0).decode() or "unknown"
            os.close(self._guard)
            self._guard = -1
            raise ClusterError(
                f"run={self.folder.parent} is being recorded by another process (pid {holder}); wait for its end, or "
                "end it"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked: %s", self.folder, error)
        os.ftruncate(self._guard, 0)
        os.pwrite(self._guard, str(os.getpid()).encode(), 0)

    def _write(self, line: bytes) -> None:
        """To the segment's file, wholly or not at all; what it does not take is held."""
        if self._held is None:
            try:
                if self._file < 0:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                    self._file = os.open(self._path(self._segment), flags, 0o644)
                if os.write(self._file, line) == len(line):
                    return
                self.trouble = OSError("the disk is full")
            except OSError as error:
                self.trouble = error
            self._held = bytearray(self._read(self._segment)[: self._size])
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
        self._held += line

    def _to_disk(self) -> None:
        """Write the segment that is held. Raises OSError where the disk still does not take it."""
        assert self._held is not None
        aside = self._path(self._segment).with_suffix(".tmp")
        aside.write_bytes(self._held)
        aside.replace(self._path(self._segment))
        self._held = None

    def _next_segment(self) -> None:
        if self._held is not None:
            try:
                self._to_disk()
            except OSError as error:
                self.trouble = error
                return  # goes on in memory
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1
        self._segment, self._size = self._segment + 1, 0

    def _delete_before(self, segment: int) -> None:
        done = [path for path in self.folder.glob("*.jsonl") if path.stem.isdecimal() and int(path.stem) < segment]
        if done:
            write_json(self.folder / HANDED, self.handed.as_json())  # first: it takes their place
            for path in done:
                path.unlink()

    def _entries(self, start: Position, last: int) -> Iterator[tuple[dict[str, Any], Position]]:
        """Entries from a position to the end of a segment, each with the position behind it."""
        for number in range(start[0], last + 1):
            place = start[1] if number == start[0] else 0
            for line in self._read(number)[place:].splitlines(keepends=True):
                place += len(line)
                try:
                    entry = json.loads(line)
                except ValueError:  # a power cut may leave a hole in a file
                    logger.warning(
                        "%s holds a damaged line before byte %d, which is left out", self._path(number), place
                    )
                    continue
                yield entry, (number, place)

    def _read(self, number: int) -> bytes:
        if number == self._segment and self._held is not None:
            return bytes(self._held)
        path = self._path(number)
        return path.read_bytes() if path.exists() else b""

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.jsonl"


def _mend(path: Path) -> int:
    """Cut a line off that was not written to its end; the bytes that remain."""
    text = path.read_bytes()
    size = text.rfind(b"\n") + 1
    if size < len(text):
        os.truncate(path, size)
    return size


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; nothing where there is no whole file."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file wholly or not at all."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value) + "\n", encoding="utf-8")
    aside.replace(path)
