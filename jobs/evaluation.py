"""Held-out bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from jobs.objectives.objective import LabelledRows, Place
from mmada.data import IGNORE_INDEX


@torch.no_grad()
def bits_per_byte(
    forward: Callable[..., Any],
    rows: LabelledRows,
    *,
    num_bytes: int,
    batch_rows: int,
    max_rows: int | None,
    place: Place,
) -> float:
    """Bits that the model needs per byte of what the labels say, ends included.

    Nats over all targets / (ln 2 · UTF-8 bytes); ``num_bytes`` are those of all rows. Over the first ``max_rows`` rows
    alone, bytes are counted in proportion to the targets seen. Workers take turns row by row and run the same number
    of forward passes (those with experts of others must), the last ones on rows that count for nothing.
    """
    num_rows = min(len(rows), max_rows or len(rows))
    per_pass = batch_rows * place.world
    totals = torch.zeros(2, dtype=torch.float64, device=place.device)
    for first in range(0, num_rows, per_pass):
        wanted = np.arange(first + place.rank * batch_rows, first + (place.rank + 1) * batch_rows)
        batch = rows.batch(np.minimum(wanted, num_rows - 1))
        batch["shift_labels"][torch.from_numpy(wanted >= num_rows)] = IGNORE_INDEX
        batch = {name: value.to(place.device) for name, value in batch.items()}
        output = forward(**batch, num_items_in_batch=1, use_cache=False)
        targets = (batch["shift_labels"] != IGNORE_INDEX).sum()
        totals += torch.stack([output.lm_loss.double(), targets.double()])
    nats, targets_seen = place.sum(totals).tolist()
    return nats / (math.log(2) * num_bytes * targets_seen / rows.num_targets)
