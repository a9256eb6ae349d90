"""What the driver of a run has heard of its workers."""

from __future__ import annotations

import math
from typing import Any


class RunRecord:
    """What the driver has heard so far; the stuff of ``summary.json``."""

    def __init__(self) -> None:
        self.steps = 0
        self.metrics: dict[str, float] = {}  # what the summary says at last
        self.curves: dict[str, dict[int, float]] = {}  # every metric by step
        self.checkpoint: str | None = None
        self.tokens = 0
        self.training_seconds = 0.0

    def add(self, row: dict[str, Any]) -> dict[str, float]:
        """Take in one step; its metrics with ``tokens_per_second``."""
        step = self.steps = row["step"]
        self.checkpoint = row.get("checkpoint", self.checkpoint)
        kept = {k: v for k, v in row.items() if k not in ("step", "checkpoint", "tokens")}
        metrics = {name: value for name, value in kept.items() if math.isfinite(value)}
        metrics["tokens_per_second"] = row["tokens"] / row["step_seconds"]
        if step not in self.curves.get("tokens_per_second", {}):  # a step done twice counts once
            self.tokens += row["tokens"]
            self.training_seconds += row["step_seconds"]
        for name, value in metrics.items():
            self.curves.setdefault(name, {})[step] = value
        self.metrics["tokens_per_second"] = self.tokens / self.training_seconds
        return metrics


def error_words(error: BaseException) -> str:
    """What ``summary.json`` says of what ended a run."""
    if isinstance(error, SystemExit):  # the session makes one of SIGTERM: its text is a number
        return "ended by SIGTERM"
    return str(error) or type(error).__name__
