"""Held-out bits per byte."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from cluster.engine import Engine
from mmada.data import TokenStream


@torch.no_grad()
def evaluate(
    engine: Engine,
    stream: TokenStream,
    *,
    sequence_length: int,
    batch_rows: int,
    max_rows: int | None,
    device: torch.device,
) -> float:
    """Bits that the model needs per byte of held-out text, document ends included.

    Nats over all targets / (ln 2 · UTF-8 bytes). Over the first ``max_rows`` rows alone, bytes are counted in
    proportion to the targets seen. Workers take turns row by row and run the same number of forward passes (those
    with experts of others must), the last ones on rows that count for nothing.
    """
    rows = stream.rows(sequence_length)
    rank, world = dist.get_rank(), dist.get_world_size()
    num_rows = min(len(rows), max_rows or len(rows))
    per_pass = batch_rows * world
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(0, num_rows, per_pass):
        wanted = np.arange(first + rank * batch_rows, first + (rank + 1) * batch_rows)
        batch = rows.batch(np.minimum(wanted, num_rows - 1))
        batch["shift_labels"][torch.from_numpy(wanted >= num_rows)] = -100
        batch = {name: value.to(device) for name, value in batch.items()}
        output = engine.forward(**batch, num_items_in_batch=1, use_cache=False)
        totals += torch.stack([output.lm_loss.double(), (batch["shift_labels"] != -100).sum().double()])
    if world > 1:
        dist.all_reduce(totals)
    nats, targets = totals.tolist()
    bytes_seen = stream.num_bytes * targets / rows.num_targets
    return nats / (math.log(2) * bytes_seen)
