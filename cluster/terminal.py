"""Keeping the chatter of Ray, DeepSpeed and C++ libraries out of the user's terminal."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

STDOUT, STDERR = 1, 2

# File descriptors 1 and 2 belong to the process, so what was there before is remembered for the process too.
# The first entry is the real terminal; later ones are log files of enclosing blocks.
_saved_stdouts: list[int] = []


@contextmanager
def quiet_terminal(log_path: Path) -> Iterator[TextIO]:
    """Send all that this process writes on stdout and stderr to a log file.

    Descriptors 1 and 2 themselves are redirected, so C++ libraries and processes started meanwhile are included.
    The log is appended to. Everything is put back on leaving, also after an exception. Blocks may be nested: the
    inner one writes to its own log and still yields the real terminal.

    Args:
        log_path: the log file; its folder is created.

    Yields:
        A line-buffered text file on what stdout was before: the place for our own output.

    Raises:
        OSError: the log file cannot be opened; nothing is redirected then.
    """
    log_path = Path(log_path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    _flush()
    # os.dup makes descriptors that children do not inherit: a stray child cannot keep the user's pipe open.
    saved_stdout, saved_stderr = os.dup(STDOUT), os.dup(STDERR)
    _saved_stdouts.append(saved_stdout)
    terminal = os.fdopen(os.dup(_saved_stdouts[0]), "w", buffering=1, encoding="utf-8", errors="replace")
    os.dup2(log, STDOUT)
    os.dup2(log, STDERR)
    os.close(log)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _on_descriptor(sys.stdout, STDOUT), _on_descriptor(sys.stderr, STDERR)
    try:
        yield terminal
    finally:
        _flush()
        sys.stdout, sys.stderr = streams
        os.dup2(saved_stdout, STDOUT)
        os.dup2(saved_stderr, STDERR)
        _saved_stdouts.remove(saved_stdout)
        os.close(saved_stdout)
        os.close(saved_stderr)
        with suppress(BrokenPipeError):  # the reader of our output has gone (`mmada train … | head`)
            terminal.close()


def _on_descriptor(stream: TextIO | None, descriptor: int) -> TextIO | None:
    """`stream` if it writes to that descriptor, else a new one that does.

    A notebook or a test runner puts a stream of its own in place of sys.stdout. The new stream is never closed:
    a logging handler that took it keeps working afterwards, on the real stdout.
    """
    if stream is None:
        return None
    try:
        if stream.fileno() == descriptor:
            return stream
    except (OSError, ValueError):  # not backed by a file, or closed
        pass
    return os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)


def _flush() -> None:
    """Empty Python's and C's buffers, so that each text lands where it was meant to go."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with suppress(BrokenPipeError):
                stream.flush()
    ctypes.CDLL(None).fflush(None)
