"""Trials for ``train.micro_batch: auto`` in the workers, before training: real steps of growing micro batches.

They are made by a model and an engine of their own, built as the run's are and thrown away, so that no weight, moment,
generator or counter of the run has to be put back. What is found is one number for all stages: it can be written into
the recipe as it stands, and evaluations, which go on across stages, go by it too.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from cluster.device_memory import MemoryMeter, free_memory
from cluster.engine import Engine
from cluster.errors import ClusterError
from jobs.combination import Combination, StepTerms
from jobs.engine_settings import training_settings
from jobs.micro_batch import Search, Usage, candidates, climb, usable, with_micro_batch
from jobs.objectives.objective import Objective, Place, StepResult
from jobs.plan import gib
from jobs.recipe import Recipe
from jobs.stage_runner import StageRunner
from mmada.pretrained import TrainableModel
from mmada.training.curriculum import StageState


def find_micro_batch(
    recipe: Recipe, objective: Objective, model: TrainableModel, place: Place, saved: int | None
) -> tuple[int, list[str]]:
    """The micro batch that all workers go by, and what there is to say of it.

    ``model`` is the run's, on its device and not yet in an engine. ``saved``: that of the checkpoint which the run
    goes on from; it is kept, since another order of sums would be another run, and whether it still fits is only said.
    Raises ClusterError where a single row does not fit, or memory runs out on one of several workers.
    """
    sizes = candidates(recipe)
    notes = []
    if saved is not None and saved not in sizes:
        notes.append(f"train.micro_batch=auto was {saved}, which no longer divides a worker's rows; looking again")
        saved = None
    if saved is not None:
        sizes = [size for size in sizes if size <= saved]
    with _out_of_the_way(model, place.device):
        memory = worker_memory(recipe, model, place.device)
        found = search(recipe, objective, model, place, sizes, usable(memory))
    if saved is not None and found.rows < saved:
        kept = f"train.micro_batch={saved} as in the checkpoint, but {_excess(found, memory)}"
        remedy = f"should it run out, go on with train.micro_batch={max(found.rows, 1)}, which rounds otherwise"
        return saved, [*notes, f"{kept}; {remedy}"]
    if found.rows == 0:
        raise ClusterError(
            f"train.micro_batch=auto: {_excess(found, memory)}; use more workers, a higher train.zero_stage, "
            "train.gradient_checkpointing=true or shorter rows"
        )
    of_then = " as in the checkpoint" if saved is not None else ""
    more = f"; {_excess(found, memory)}" if found.too_much is not None else ""
    takes = f"a step takes {gib(found.peak)} of a worker's {gib(memory)}" if found.peak else "there is no choice"
    return found.rows, [*notes, f"train.micro_batch={found.rows}{of_then}: {takes}{more}"]


def _excess(found: Search, memory: int) -> str:
    assert found.too_much is not None
    rows, bytes_ = found.too_much
    subject = "1 row" if rows == 1 else f"{rows} rows"
    if bytes_ is None:
        return f"memory ran out with {subject} ({gib(memory)} for a worker)"
    return f"{subject} would take {gib(bytes_)}, and of a worker's {gib(memory)} a tenth is kept free"


def worker_memory(recipe: Recipe, model: TrainableModel, device: torch.device) -> int:
    """Bytes for one worker's weights, gradients, optimizer and activations, the least of any worker's.

    What is free on the device, an even share of it where several workers of a machine have it together, and no more
    than ``cluster.memory_per_worker``. On a CPU ``model`` lies in it already, and counts as free.
    """
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())  # all models have been built by now
    memory = free_memory(device)
    if device.type == "cpu":
        memory = memory // hosts.count(socket.gethostname()) + bytes_of(model)
    if recipe.cluster.memory_per_worker is not None:
        memory = min(memory, int(recipe.cluster.memory_per_worker * 2**30))
    dist.barrier()  # nobody takes anything before all have looked
    return -_largest([-memory], device)[0]


def search(
    recipe: Recipe, objective: Objective, model: TrainableModel, place: Place, sizes: list[int], room: int
) -> Search:
    """Climb over ``sizes`` with trials of one engine; ``model``: whose settled config those of the trials take over."""
    if sizes == [1]:
        return Search(1, 0)
    trials = Trials(recipe, objective, model, place)
    try:
        return climb(sizes, trials.usage, room)
    finally:
        trials.close()
        del trials
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()


class Trials:
    """A model and an engine like the run's, on the run's data. All workers call every method together."""

    def __init__(self, recipe: Recipe, objective: Objective, model: TrainableModel, place: Place) -> None:
        self.objective, self.place, self.rate = objective, place, recipe.train.learning_rate
        self.meter = MemoryMeter(place.device)
        self.stages = StageRunner(recipe, objective)
        self.rows_per_worker = [stage.global_batch // place.world for stage in self.stages.stages]
        self._is_warm = False
        self.meter.measure(lambda: self._build(with_micro_batch(recipe, 1), model))

    def _build(self, recipe: Recipe, model: TrainableModel) -> None:
        own = self.objective.build_model()
        own.config.patches.threshold = model.config.patches.threshold
        self.model = own.to(self.place.device)
        self.engine = Engine(self.model, training_settings(recipe, self.model))
        self.model.reduce_load = self.place.sum if self.place.world > 1 else None
        self.combination = Combination(recipe, self.stages, self.model, self.place)

    def usage(self, rows: int) -> Usage | None:
        """What a step with micro batches of so many rows takes, the most of any stage and worker; None: too much."""
        try:
            if not self._is_warm:  # the first step makes the optimizer's state and all buffers
                self._all_stages(1)
                self._is_warm = True
            own = self._all_stages(rows)
        except torch.OutOfMemoryError as error:
            if self.place.world == 1:
                return None
            # The others wait for this worker in the middle of a step, and only its end lets them go.
            raise ClusterError(
                f"train.micro_batch=auto: memory ran out on a worker with {rows} rows; use a train.micro_batch below"
            ) from error
        peak, forward = _largest([own.peak, own.forward], self.place.device)
        return Usage(peak, forward)

    def _all_stages(self, rows: int) -> Usage:
        usages = []
        for number, stage in enumerate(self.stages.stages):
            # In its middle a loss whose weight rises from 0, or falls to it, has one.
            self.stages.state = replace(StageState(), stage=number, step_in_stage=stage.plan.steps // 2)
            usages.append(self._step(rows, 1 if rows >= self.rows_per_worker[number] else 2))
        return Usage(max(usage.peak for usage in usages), max(usage.forward for usage in usages))

    def _step(self, rows: int, passes: int) -> Usage:
        """One optimizer step of one or two micro batches: with several, gradients lie beside activations."""
        batch = {name: value.to(self.place.device) for name, value in self.stages.longest_rows(rows).items()}
        share = self.objective.count(batch)[0].to(self.place.device, torch.float64).clamp(min=1)
        self.engine.set_batch(rows, passes)
        extra: list[StepTerms | None] = []
        results: list[StepResult] = []
        peaks, rises = [self.meter.measure(lambda: extra.append(self.combination.begin()))], []
        forward = partial(self.objective.forward, self.engine, batch, share, extra[0])
        for _ in range(passes):
            before = self.meter.level
            peaks.append(self.meter.measure(lambda: results.append(forward())))
            rises.append(peaks[-1] - before)
            peaks.append(self.meter.measure(lambda: self._rest(results[-1])))
        self.meter.measure(results.clear)
        return Usage(max(peaks), max(rises))

    def _rest(self, result: StepResult) -> None:
        self.engine.backward(self.combination.total(self.engine, result))
        self.engine.step(self.rate)

    def close(self) -> None:
        """Give everything back; nothing here can be used afterwards."""
        self.engine.destroy()
        self.model.reduce_load = None
        del self.engine, self.model, self.combination


def bytes_of(model: TrainableModel) -> int:
    """Of its parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@contextmanager
def _out_of_the_way(model: TrainableModel, device: torch.device) -> Iterator[None]:
    """The run's own weights leave a GPU to the trials, which have as many."""
    if device.type == "cpu":
        yield
        return
    model.to("cpu")
    try:
        yield
    finally:
        model.to(device)


def _largest(values: list[int], device: torch.device) -> list[int]:
    """Each value's maximum over the workers."""
    found = torch.tensor(values, dtype=torch.int64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()
