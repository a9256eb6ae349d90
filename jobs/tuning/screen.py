"""A sweep on one screen: how many trials are where, the best so far, and what runs."""

from __future__ import annotations

import threading
import time
from typing import TextIO

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jobs.console import LiveConsole
from jobs.tuning.book import ENDED, Book, TrialEntry
from jobs.wording import shown

_ROWS = 12  # of trials that are shown, the running ones first


class SweepScreen(LiveConsole):
    """``refresh`` shows the book anew, on a terminal only."""

    def __init__(self, stream: TextIO, trials: int, metric: str, mode: str) -> None:
        super().__init__(stream)
        self.trials, self.metric, self.mode = trials, metric, mode
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def refresh(self, book: Book) -> None:
        """The book as it is now."""
        if self.console.is_terminal:
            with self._lock:
                self.live.update(self._screen(book))

    def ended(self, book: Book, entry: TrialEntry) -> None:
        """A trial has ended: a line that stays."""
        self.say(f"{entry.name} {self.verdict(entry):<42} {settings_words(entry)}")
        self.refresh(book)

    def verdict(self, entry: TrialEntry) -> str:
        """How a trial stands, in words."""
        value = "nothing measured" if entry.value is None else f"{self.metric} {entry.value:.4f}"
        if entry.status == "failed":
            return f"failed at step {entry.step}: {entry.error}"
        return f"{entry.status:<8} step {entry.step:>5}  {value}"

    def _screen(self, book: Book) -> RenderableType:
        counts = {status: len(book.with_status(status)) for status in ("running", "paused", *ENDED)}
        waiting = max(0, self.trials - sum(counts.values()))
        words = [f"{count} {status}" for status, count in {**counts, "to come": waiting}.items() if count]
        best = book.best(self.mode)
        head = Text(f"trials   {', '.join(words)}   {_clock(time.monotonic() - self._began)}")
        lines: list[RenderableType] = [head]
        if best is not None:
            lines.append(Text(f"best     {best.name} {self.metric} {best.value:.4f}  {settings_words(best)}"))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("running", "step", self.metric, "settings"):
            table.add_column(column, no_wrap=column != "settings", overflow="fold")
        for entry in book.with_status("running")[:_ROWS]:
            value = "" if entry.value is None else f"{entry.value:.4f}"
            table.add_row(entry.name, str(entry.step), value, settings_words(entry))
        return Group(*lines, table)


def settings_words(entry: TrialEntry) -> str:
    """A trial's settings in one line: keys by their last names where those tell them apart."""
    lasts = [key.rpartition(".")[2] for key in entry.settings]
    words = []
    for key, value in entry.settings.items():
        last = key.rpartition(".")[2]
        name = last if lasts.count(last) == 1 else ".".join(key.split(".")[-2:])
        words.append(f"{name}={_value(value)}")
    return " ".join(words)


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(each)}" for name, each in value.items()) + "}"
    return shown(value)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
