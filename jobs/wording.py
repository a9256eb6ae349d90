"""How values and choices are put in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def shown(value: Any) -> str:
    """A value as a recipe would say it, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def listed(choices: Iterable[object], last: str = "or") -> str:
    """``1, 2 or 4``; of many, the first and the final ones."""
    words = [str(choice) for choice in choices]
    if len(words) > 12:
        words = [*words[:8], "…", *words[-3:]]
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that ``word`` most resembles, or None."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def suggestion(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The remedy for a word that is not known: the nearest one, or all there are, each after ``prefix``."""
    known = list(known)
    guess = closest(word, known)
    return f"did you mean {prefix}{guess}?" if guess else f"use {listed(prefix + each for each in known)}"
