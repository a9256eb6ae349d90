"""What a worker tells the driver, and how often."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist

from cluster.launch import REPORT_INTERVAL_S

METRICS_FILE = "logs/metrics.jsonl"  # every step's metrics, as the workers knew them


def read_metrics(run_dir: Path, up_to: int) -> list[dict[str, Any]]:
    """The rows of steps 1 to ``up_to`` that the workers wrote down; of a step done twice, the later one."""
    path = run_dir / METRICS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # a line that a killed worker did not finish
            row = json.loads(line)
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows) if step <= up_to]


class Progress:
    """Gathers each step's metrics on rank 0 and reports them together, every few seconds.

    ``report`` (``ray.train.report``) is a meeting of all workers; whether it is time is rank 0's decision, shared
    with the others in a reduction of one number.
    """

    def __init__(
        self, rank: int, world: int, run_dir: Path, device: torch.device, report: Callable[[dict[str, Any]], None]
    ) -> None:
        self.rank, self.world, self._device, self._send = rank, world, device, report
        self._history: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._settled: dict[str, Any] = {}
        self._rows_log: TextIO | None = None
        self._last = time.monotonic()
        self._identify(run_dir / "workers.json")
        self._rows_path = run_dir / "logs" / f"rows-{rank}.jsonl"
        self._metrics_path = run_dir / METRICS_FILE

    def note(self, notes: list[str]) -> None:
        """Lines that the driver should show."""
        self._notes += notes if self.rank == 0 else []

    def settle(self, key: str, value: Any) -> None:
        """What a setting that the recipe leaves open has come to."""
        self._settled[key] = value

    def begin(self, start: int, steps: int) -> None:
        """Say where the run stands before its first step."""
        if self.rank == 0:
            with self._metrics_path.open("a") as file:
                file.write("\n")  # ends the line that a killed worker may have left half written
        first = {"start": start, "steps": steps, "notes": self._notes, "settled": self._settled}
        self._report(first if self.rank == 0 else {})

    def record_rows(self, step: int, indices: np.ndarray) -> None:
        """Keep which rows this worker read at ``step``: the evidence that nothing was skipped or seen twice."""
        if self._rows_log is None:
            self._rows_log = open(self._rows_path, "a", buffering=1)  # noqa: SIM115 (lives as long as the worker)
        self._rows_log.write(json.dumps({"step": step, "rows": indices.tolist()}) + "\n")

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Take in one step. It is on disk at once, where a driver finds it should this worker die before ``send``."""
        self._history.append({"step": step, **metrics})
        self._write_newest()

    def add_checkpoint(self, folder: str) -> None:
        """The step taken in last has been saved in ``folder``."""
        self._history[-1]["checkpoint"] = folder
        self._write_newest()

    def send(self, *, force: bool = False) -> None:
        """Report what has gathered if it is time, or at once with ``force``."""
        if force or self._is_time():
            self._report({"history": self._history} if self.rank == 0 else {})
            self._history = []

    def _write_newest(self) -> None:
        if self.rank == 0:
            with self._metrics_path.open("a") as file:
                file.write(json.dumps(self._history[-1]) + "\n")

    def _is_time(self) -> bool:
        is_time = self.rank == 0 and time.monotonic() - self._last > REPORT_INTERVAL_S
        due = torch.tensor([float(is_time)], device=self._device)
        if self.world > 1:
            dist.all_reduce(due)
        return bool(due.item())

    def _report(self, message: dict[str, Any]) -> None:
        self._send(message)
        self._last = time.monotonic()

    def _identify(self, path: Path) -> None:
        """Write who runs where: rank, process, host."""
        own = {"rank": self.rank, "pid": os.getpid(), "host": socket.gethostname()}
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, own)
        if self.rank == 0:
            path.write_text(json.dumps(everyone, indent=1))
