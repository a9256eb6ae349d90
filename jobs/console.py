"""The run on the terminal: one live line, and a plain line for what stays."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

_PLAIN_INTERVAL_S = 15.0  # a log file gets a line this often, a terminal one that moves
_PATIENCE_S = 120.0  # silence that is spoken of, and again each time that it has doubled


class LiveConsole:
    """A terminal with a part at its foot that moves, and lines above it that stay; a plain stream gets the latter."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def wait(self, text: str) -> None:
        """What is waited for, until the next update; on a plain stream a line that stays."""
        if self.console.is_terminal:
            self.live.update(Text(text, style="dim"))
        else:
            self.say(text)


class RunLine(LiveConsole):
    """Shows a run: ``update`` after every report, ``say`` for lines that stay.

    ``words`` says what of a step's metrics is shown.
    """

    def __init__(self, stream: TextIO, words: Callable[[dict[str, Any]], list[str]]) -> None:
        super().__init__(stream)
        self._words = words
        self._last_plain = 0.0
        self._started: tuple[float, int] | None = None
        self._patience = _PATIENCE_S
        self.steps = 0

    def silence(self, seconds: float) -> None:
        """Nothing has been heard for so long: a line now and then, as nobody can tell long work from a hang."""
        if seconds < _PATIENCE_S:
            self._patience = _PATIENCE_S
        elif seconds >= self._patience:
            self._patience = 2 * seconds
            self.say(
                f"nothing from the workers for {seconds:.0f} s: a slow start, a long step, evaluation or "
                "checkpoint, or a hang; Ctrl-C ends the run and keeps its last good checkpoint"
            )

    def begin(self, start: int, steps: int) -> None:
        """Training starts (or starts again) after ``start`` of ``steps`` steps."""
        self.steps, self._started = steps, (time.monotonic(), start)

    def update(self, row: dict[str, Any], *, stays: bool = False) -> None:
        """The newest step's metrics; a line that ``stays`` is also printed."""
        line = self._line(row)
        if self.console.is_terminal:
            self.live.update(Text(line))
        if stays or not self.console.is_terminal and time.monotonic() - self._last_plain > _PLAIN_INTERVAL_S:
            self.say(line)
        else:
            return
        self._last_plain = time.monotonic()

    def _line(self, row: dict[str, Any]) -> str:
        parts = [f"step {row['step']:>5}/{self.steps}", *self._words(row)]
        left = self._time_left(row["step"])
        if left is not None:
            parts.append(f"{left} left")
        return "  ".join(parts)

    def _time_left(self, step: int) -> timedelta | None:
        if self._started is None or step <= self._started[1] or step >= self.steps:
            return None
        began, start = self._started
        return timedelta(seconds=round((time.monotonic() - began) / (step - start) * (self.steps - step)))
