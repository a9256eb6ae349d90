"""A whole run of ``mmada train`` in this process: the training worker itself, without Ray and MLflow.

For comparisons of many small runs, where stages, mixtures and objectives must be those of the real thing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.recipe import Recipe


def train_alone(recipe: Recipe, run_dir: Path) -> list[dict[str, Any]]:
    """Train ``recipe`` to its end below ``run_dir``; the metrics of every step, in order.

    One process is one worker on the processor, and can do this once: DeepSpeed keeps what it was started with. Its
    chatter goes to the run's log. Raises what the worker raises.
    """
    assert not dist.is_initialized(), "one run for each process"
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    from jobs.objectives.registry import prepare_objective
    from jobs.worker import TrainingWorker, write_output_to

    write_output_to(run_dir / "logs" / "worker-0.log")
    run_dir.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{run_dir.resolve()}/meeting", rank=0, world_size=1)
    rows: list[dict[str, Any]] = []
    try:
        prepared = prepare_objective(recipe).prepared
        TrainingWorker(
            recipe, run_dir, prepared, torch.device("cpu"), lambda message: rows.extend(message.get("history", []))
        ).run()
    finally:
        dist.destroy_process_group()
    return rows
