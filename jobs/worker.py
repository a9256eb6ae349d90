"""What one training worker does: build, resume, then batch → loss → backward → step → report.

Ray Train starts ``train_worker`` in every worker process. All state that a step depends on is either in the
checkpoint or a pure function of (seed, step): the batch, the router's noise, the learning rate.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.checkpoints import CheckpointStore
from cluster.engine import Engine
from cluster.errors import ClusterError
from jobs.calibration import report_calibration
from jobs.checkpointing import Resume, find_resume, restore, save
from jobs.combination import Combination
from jobs.engine_settings import training_settings
from jobs.micro_batch import with_micro_batch
from jobs.micro_batch_trials import find_micro_batch
from jobs.objectives.objective import Place, StepResult
from jobs.objectives.registry import open_objective
from jobs.progress import Progress
from jobs.recipe import Recipe
from jobs.recipe_schema import AUTO
from jobs.stage_runner import StageRunner
from jobs.start_weights import load_start, start_folder
from mmada.data import rank_slice, sample_ids


def train_worker(config: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker; ``config`` holds ``recipe`` (resolved), ``run_dir`` and ``prepared``.

    ``prepared``: the folder of prepared text, None where there is none.
    """
    context = ray.train.get_context()
    run_dir = Path(config["run_dir"])
    write_output_to(run_dir / "logs" / f"worker-{context.get_world_rank()}.log")
    recipe, prepared = Recipe.model_validate(config["recipe"]), config["prepared"] and Path(config["prepared"])
    share = (os.cpu_count() or 1) // context.get_local_world_size()
    torch.set_num_threads(recipe.cluster.threads_per_worker or max(1, share))
    TrainingWorker(recipe, run_dir, prepared, ray.train.torch.get_device(), ray.train.report).run()


def write_output_to(log: Path) -> None:
    """Everything this process prints from now on goes to the run's folder."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


class TrainingWorker:
    """One rank of a training run. Every method is called by all ranks together.

    torch.distributed is initialised; ``report`` takes what this rank has to say, all ranks at the same time.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        prepared: Path | None,
        device: torch.device,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self.recipe, self.run_dir = recipe, run_dir
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.objective = open_objective(recipe, prepared)
        self.place = Place(self.rank, self.world, device, self._sum)
        self.model = self.objective.build_model().to(self.device)
        self.settings = training_settings(recipe, self.model)
        self.stages = StageRunner(recipe, self.objective)
        self.combination = Combination(recipe, self.stages, self.model, self.place)
        self.store = CheckpointStore(run_dir / "checkpoints", keep=recipe.train.keep_checkpoints)
        self.progress = Progress(self.rank, self.world, run_dir, device, report)

        resume = self._agree_on_resume()
        self._agree_on_threshold(self._begin_weights(resume))
        if recipe.train.micro_batch == AUTO:
            self._settle_micro_batch(resume)
        self.engine = Engine(self.model, self.settings)
        self.model.reduce_load = self._sum if self.world > 1 else None
        torch.manual_seed(recipe.run.seed + 1 + self.rank)
        self.start = self._resume(resume) if resume else 0
        self._enter_stage()

    def run(self) -> None:
        """Train from where the run stands to the end of its last stage, evaluating and saving on the way."""
        train = self.recipe.train
        self.progress.begin(self.start, train.steps)
        while not self.stages.is_done:
            started = time.perf_counter()
            if self.stages.begins_stage:
                self._enter_stage()
            metrics = self.train_step(self.stages.state.step)
            metrics["step_seconds"] = time.perf_counter() - started
            done, last = self.stages.state.step, self.stages.is_done
            if last or (train.evaluate_every and done % train.evaluate_every == 0):
                found = self.evaluate(all_rows=last)
                metrics |= found
                self.stages.evaluated(found)
                if self.stages.is_done and not last:  # it was good enough: measure it on all rows
                    last, metrics = True, metrics | self.evaluate(all_rows=True)
            if last:
                metrics |= self._finish()
            self.progress.add(done, metrics)  # before the checkpoint: what a resume skips has its metrics on disk
            saves = last or (train.checkpoint_every > 0 and done % train.checkpoint_every == 0)
            if saves:
                self.progress.add_checkpoint(self.save(done))
            self.progress.send(force=saves)

    def _enter_stage(self) -> None:
        """Take up what the stage says of batches and of what learns."""
        stage = self.stages.stage
        rows = stage.global_batch // self.recipe.cluster.workers
        micro = self.recipe.micro_batch_of(rows)
        self.engine.set_batch(micro, rows // micro)
        self.engine.freeze(stage.frozen)

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step over the global batch of ``step``; metrics are those of the whole batch."""
        batch = self._batch(step)
        counts = torch.stack([count.to(self.device, torch.float64) for count in self.objective.count(batch)])
        targets, tokens = self._sum(counts)
        # Each micro batch divides by its even share of the targets: the mean over workers and micro batches, which
        # is what the engine takes, is then the mean over the targets of the whole batch, however they are spread.
        micro_batch, accumulation = self.engine.settings.micro_batch, self.engine.settings.accumulation
        share = targets / (self.world * accumulation)
        learning_rate = self.stages.learning_rate()
        results: list[StepResult] = []
        extra = self.combination.begin()
        for micro in range(accumulation):
            rows = slice(micro * micro_batch, (micro + 1) * micro_batch)
            part = {name: value[rows] for name, value in batch.items()}
            result = self.objective.forward(self.engine, part, share, extra)
            self.engine.backward(self.combination.total(self.engine, result))
            self.engine.step(learning_rate)
            results.append(result)
        metrics = self._means(results)
        if not math.isfinite(metrics["loss"]):
            raise ClusterError(
                f"loss of step {step + 1} is {metrics['loss']}; lower train.learning_rate or clip_grad_norm"
            )
        metrics |= {"learning_rate": learning_rate, "gradient_norm": self.engine.gradient_norm, "tokens": int(tokens)}
        num_patches = [result.num_patches.sum() for result in results if result.num_patches is not None]
        if num_patches:
            metrics["bytes_per_patch"] = metrics["tokens"] / float(self._sum(torch.stack(num_patches).sum()))
        loads = [result.expert_load for result in results if result.expert_load is not None]
        if loads:
            load_LE = torch.stack(loads).sum(0)
            self.model.update_router_bias(load_LE)
            violation_L = load_LE.max(dim=1).values / load_LE.mean(dim=1) - 1
            metrics["expert_load_max_violation"] = float(violation_L.max())
        return metrics | self.combination.finish() | self.stages.stepped(metrics["gradient_norm"])

    def _means(self, results: list[StepResult]) -> dict[str, float]:
        """The metrics of a step, each the mean over its micro batches and the workers."""
        parts = torch.stack([torch.stack([*result.metrics.values()]) for result in results])
        means = (self._sum(parts.mean(0).double()) / self.world).tolist()
        return dict(zip(results[0].metrics, means, strict=True))

    def evaluate(self, *, all_rows: bool) -> dict[str, float]:
        """Metrics on what is held out, over all rows or the first ``train.evaluate_rows``."""
        max_rows = None if all_rows else self.recipe.train.evaluate_rows
        self.engine.set_training(False)
        metrics = self.objective.evaluate(self.engine, self.place, self.settings.micro_batch, max_rows)
        self.engine.set_training(True)
        return metrics

    def _finish(self) -> dict[str, float]:
        """What is left to do with the model after the last step, and to say of it."""
        rows, found = self.settings.micro_batch, {}
        self.engine.set_training(False)
        self.objective.finish(self.engine, self.place, rows)
        if self.stages.names_loss("calibration"):
            found = report_calibration(self.objective, self.engine, self.place, batch_rows=rows, run_dir=self.run_dir)
        self.engine.set_training(True)
        return found

    def save(self, step: int) -> str:
        """Write, check and make current the checkpoint of ``step``; its folder."""
        metadata = {
            "step": step,
            "data": self.objective.fingerprint,
            "seed": self.recipe.run.seed,
            "curriculum": self.stages.to_json(),
            "micro_batch": self.settings.micro_batch,
        }
        architecture, tokenizer = type(self.model).__name__, self.objective.tokenizer
        folder = save(
            self.engine, self.store, tokenizer, step, metadata, self.rank, self.world, architecture=architecture
        )
        return str(folder)

    def _batch(self, step: int) -> dict[str, Tensor]:
        """This rank's rows of the global batch of ``step``."""
        size = self.stages.stage.global_batch
        drawn, own = self.stages.draw(), rank_slice(np.arange(size), self.rank, self.world)
        batch = drawn.read(own)
        batch["sample_ids"] = torch.from_numpy(sample_ids(self.recipe.run.seed, step, self.stages.largest_batch)[own])
        self.progress.record_rows(step, drawn.record_of(own))
        return {name: value.to(self.device) for name, value in batch.items()}

    def _agree_on_resume(self) -> Resume | None:
        """Rank 0 looks for the newest good checkpoint (and converts it if the topology changed); all use it."""
        found: list[Any] = [None]
        if self.rank == 0:
            self.store.discard_partials()
            found[0] = find_resume(self.store, self.settings, self.world, self.run_dir)
        dist.broadcast_object_list(found, src=0)
        if found[0] is not None:
            self.progress.note(found[0].notes)
        return found[0] if found[0] is not None and found[0].folder is not None else None

    def _resume(self, resume: Resume) -> int:
        """Engine, generators and stages as the checkpoint left them; the number of steps done."""
        assert resume.folder is not None
        done = restore(self.engine, resume, self.rank)
        self.stages.restore(resume.metadata.get("curriculum"), done)
        return done

    def _begin_weights(self, resume: Resume | None) -> Path | None:
        """A new run begins with the weights of ``train.start_from``; the saved model that this run goes on from."""
        if resume is not None and resume.folder is not None:
            return resume.folder / "model"
        if self.recipe.train.start_from is None:
            return None
        folder = start_folder(self.recipe.train.start_from)
        self.progress.note(load_start(self.model, folder))
        return folder

    def _agree_on_threshold(self, saved: Path | None) -> None:
        """Where the recipe leaves the threshold of byte patches open, all take what rank 0 finds."""
        is_open = self.model.config.patches.threshold is None
        self.progress.note(self.objective.settle(self.model, saved))
        found = [self.model.config.patches.threshold]
        dist.broadcast_object_list(found, src=0)
        self.model.config.patches.threshold = found[0]
        if is_open and found[0] is not None:
            self.progress.settle("model.patches.threshold", found[0])

    def _settle_micro_batch(self, resume: Resume | None) -> None:
        """The recipe becomes the one that has the number written out: all else is as if it had stood there."""
        saved = None if resume is None else resume.metadata.get("micro_batch")
        found, notes = find_micro_batch(self.recipe, self.objective, self.model, self.place, saved)
        self.progress.note(notes)
        self.progress.settle("train.micro_batch", found)
        self.recipe = with_micro_batch(self.recipe, found)
        self.settings = training_settings(self.recipe, self.model)

    def _sum(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
        return value
