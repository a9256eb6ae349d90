"""Training workers without Ray, for tests: processes joined by gloo that run ``TrainingWorker`` itself."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from jobs.bare_loop import BareLoop, text_batches
from jobs.recipe import Recipe, load_recipe
from mmada.model import MMaDAForCausalLM
from tests.patience import PATIENCE_S

CPUS_ALONE = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def small_recipe(run_dir: Path, **overrides: Any) -> Recipe:
    """``debug`` on two threads less: four layers' worth of nothing, but every part is in it."""
    keys = {"run.dir": str(run_dir), "run.name": "run", "train.checkpoint_every": 0, "train.evaluate_every": 0}
    keys |= {"cluster.threads_per_worker": 1} | overrides
    return load_recipe("debug", [f"{key}={value}" for key, value in keys.items()])


def run_together(world: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``job(rank, *arguments)`` in ``world`` processes joined by gloo; each one's result, by rank."""
    _be_ready_to_fork()
    results = multiprocessing.get_context("forkserver").SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = (world, port, dict(os.environ), job, arguments, results)
    spawned = multiprocessing.start_processes(_joined, given, nprocs=world, join=False, start_method="forkserver")
    collected: dict[int, Any] = {}
    try:
        while len(collected) < world:
            while not results.empty():
                rank, value = results.get()
                collected[rank] = value
            spawned.join(timeout=0.2)  # raises what a process raised
        while not spawned.join(timeout=PATIENCE_S):
            pass
    finally:
        for process in spawned.processes:
            process.kill()
    return [collected[rank] for rank in range(world)]


def _be_ready_to_fork() -> None:
    """Have a process that has loaded what workers load, and has done nothing with it: all workers are forked from it.

    Loading takes longer than most of what they are then asked to do. All order their sets of texts alike, other than
    processes that were started one by one.
    """
    own = {**CPUS_ALONE, "PYTHONPATH": str(Path(__file__).parents[2])}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        forkserver.set_forkserver_preload(["jobs.worker"])
        forkserver.ensure_running()


def bare_curve(recipe: Recipe, prepared: Path, steps: int) -> tuple[list[tuple[float, float]], MMaDAForCausalLM]:
    """(loss, gradient norm) of every step in this process with one thread, and the model after them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loop = BareLoop(recipe, text_batches(recipe, prepared))
    curve = [loop.step(step) for step in range(steps)]
    torch.set_num_threads(threads)
    return curve, loop.model


def curves(
    rank: int, recipes: dict[str, Recipe], prepared: Path, run_dir: Path, steps: int
) -> dict[str, tuple[list[tuple[float, float]], dict[str, tuple[int, ...]]]]:
    """By recipe, one after the other in the same processes: (loss, gradient norm) of every step, and the names and
    shapes of the tensors that an export would hold."""
    from jobs.worker import TrainingWorker

    found = {}
    for name, recipe in recipes.items():
        folder = run_dir / name.replace(" ", "-")
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        worker = TrainingWorker(recipe, folder, prepared, torch.device("cpu"), lambda message: None)
        taken = [worker.train_step(step) for step in range(steps)]
        tensors = {name: tuple(tensor.shape) for name, tensor in worker.engine.named_full_tensors()}
        found[name] = [(metrics["loss"], metrics["gradient_norm"]) for metrics in taken], tensors
    return found


def run_all(
    jobs: list[tuple[Recipe, Path, int]], prepared: Path
) -> list[tuple[list[dict[str, Any]], list[str], dict[str, Any]]]:
    """For every job (recipe, run_dir, stop) the metrics of its steps, its notes, and what open settings came to.

    A job runs to its end, or until it has saved step ``stop``. All jobs have the same number of workers.
    """
    return run_together(jobs[0][0].cluster.workers, _train_all, jobs, prepared)[0]


def _train_all(rank: int, jobs: list[tuple[Recipe, Path, int]], prepared: Path) -> list[Any]:
    from jobs.worker import TrainingWorker

    class Stop(Exception):
        pass

    found = []
    for recipe, run_dir, stop in jobs:
        messages: list[dict[str, Any]] = []

        def report(message: dict[str, Any], messages: list[dict[str, Any]] = messages, stop: int = stop) -> None:
            messages.append(message)
            done = torch.tensor([max((row["step"] for row in message.get("history", [])), default=0)])
            dist.all_reduce(done)  # ranks stop together
            if done.item() >= stop:
                raise Stop

        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        worker = TrainingWorker(recipe, run_dir, prepared, torch.device("cpu"), report)
        with contextlib.suppress(Stop):
            worker.run()
        rows = [row for message in messages for row in message.get("history", [])]
        first = messages[0] if rank == 0 else {"notes": [], "settled": {}}
        found.append((rows, first["notes"], first["settled"]))
    return found


def _joined(
    rank: int,
    world: int,
    port: int,
    environment: dict[str, str],
    job: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    for seed_anew in (random.seed, np.random.seed, torch.seed):
        seed_anew()
    os.environ.clear()  # that of whoever started the process that this one was forked from
    os.environ |= environment | CPUS_ALONE
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (DeepSpeed's chatter)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results.put((rank, job(rank, *arguments)))
    dist.barrier()
    dist.destroy_process_group()
