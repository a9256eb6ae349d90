"""Training workers without Ray, for tests: processes joined by gloo that run ``TrainingWorker`` itself."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from jobs.recipe import Recipe, load_recipe

TIMEOUT_S = 240


def small_recipe(run_dir: Path, **overrides: Any) -> Recipe:
    """``debug`` on two threads less: four layers' worth of nothing, but every part is in it."""
    keys = {"run.dir": str(run_dir), "run.name": "run", "train.checkpoint_every": 0, "train.evaluate_every": 0}
    keys |= {"cluster.threads_per_worker": 1} | overrides
    return load_recipe("debug", [f"{key}={value}" for key, value in keys.items()])


def run_together(world: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``job(rank, *arguments)`` in ``world`` processes joined by gloo; each one's result, by rank."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawned = multiprocessing.start_processes(
        _joined, (world, port, job, arguments, results), nprocs=world, join=False, start_method="spawn"
    )
    collected: dict[int, Any] = {}
    try:
        while len(collected) < world:
            while not results.empty():
                rank, value = results.get()
                collected[rank] = value
            spawned.join(timeout=0.2)  # raises what a process raised
        while not spawned.join(timeout=TIMEOUT_S):
            pass
    finally:
        for process in spawned.processes:
            process.kill()
    return [collected[rank] for rank in range(world)]


def _joined(
    rank: int, world: int, port: int, job: Callable[..., Any], arguments: tuple[Any, ...], results: Any
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (DeepSpeed's chatter)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results.put((rank, job(rank, *arguments)))
    dist.barrier()
    dist.destroy_process_group()
