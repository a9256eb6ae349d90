"""What stands behind options of the command line, read and refused in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def file_to_write(text: str) -> Path:
    """Reads the path of a file in a folder that exists, so that nothing is measured in vain."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} lies in no existing folder; make {path.parent} first")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    return path


def int_from(low: int) -> Callable[[str], int]:
    """Reads a whole number that is ``low`` or more."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} on; use {low} or more")
        return value

    return read


def float_from(low: float) -> Callable[[str], float]:
    """Reads a finite number that is ``low`` or more."""

    def read(text: str) -> float:
        value = number(text)
        if value is None or not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low:g} on; use {low:g} or more")
        return value

    return read


def probability(text: str) -> float:
    """Reads a number in (0, 1]."""
    value = number(text)
    if value is None or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0 and at most 1; use 1 for no cut")
    return value


def number(text: str) -> float | None:
    """``text`` as a number, or None."""
    try:
        return float(text)
    except ValueError:
        return None
