"""``mmada train``: one recipe, trained on Ray with DeepSpeed, tracked, resumable."""

from __future__ import annotations

import json
import lzma
import math
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.checkpoints import CheckpointStore
from cluster.errors import ClusterError
from cluster.launch import WorkersFailed, run_workers
from cluster.session import RaySession
from cluster.terminal import quiet_terminal
from cluster.tracking import Tracker
from jobs.console import RunLine
from jobs.prepared_data import cache_dir, text_source
from jobs.progress import read_metrics
from jobs.recipe import RESOLVED_RECIPE, Recipe
from mmada.data import PreparedText, load_tokenizer, prepare
from mmada.errors import DataError
from mmada.plots.learning_curve import learning_curve

_XZ_LIMIT = 64 * 2**20  # bytes of held-out text up to which the comparison with xz is worth its time


@dataclass
class RunRecord:
    """What the driver has heard so far; the stuff of ``summary.json``."""

    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    loss: dict[int, float] = field(default_factory=dict)  # by step
    held_out: dict[int, float] = field(default_factory=dict)
    checkpoint: str | None = None
    tokens: int = 0
    training_seconds: float = 0.0

    def add(self, row: dict[str, Any]) -> dict[str, float]:
        """Take in one step; its metrics with ``tokens_per_second``."""
        step = self.steps = row["step"]
        self.checkpoint = row.get("checkpoint", self.checkpoint)
        metrics = {k: v for k, v in row.items() if k not in ("step", "checkpoint", "tokens") and math.isfinite(v)}
        metrics["tokens_per_second"] = row["tokens"] / row["step_seconds"]
        if step not in self.loss:  # a step done twice counts once
            self.tokens += row["tokens"]
            self.training_seconds += row["step_seconds"]
        self.loss[step] = row["loss"]
        self.metrics["loss"] = row["loss"]
        if "bits_per_byte" in row:
            self.held_out[step] = row["bits_per_byte"]
            self.metrics["bits_per_byte"] = row["bits_per_byte"]
        self.metrics["tokens_per_second"] = self.tokens / self.training_seconds
        return metrics


def run(recipe: Recipe) -> int:
    """Train a recipe that ``jobs.recipe_checks`` has passed; the exit code.

    Raises RecipeError, DataError or ClusterError before anything has started.
    """
    run_dir = recipe.run_dir.resolve()
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    prepared = prepare(text_source(recipe), tokenizer, cache_dir(recipe), held_out=recipe.data.held_out)
    is_new = not run_dir.exists()
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        return TrainingRun(recipe, run_dir, prepared).run()
    except BaseException:
        if is_new and not (run_dir / RESOLVED_RECIPE).exists():  # nothing has begun: leave nothing behind
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


def _work(config: dict[str, Any]) -> None:
    """What runs in every worker. Imported there: the driver never loads DeepSpeed, which talks when it is loaded."""
    if not config["recipe"]["cluster"]["gpus_per_worker"]:  # also where there are GPUs that others use
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    from jobs.worker import train_worker

    train_worker(config)


class TrainingRun:
    """The driver's side of one run."""

    def __init__(self, recipe: Recipe, run_dir: Path, prepared: PreparedText) -> None:
        self.recipe, self.run_dir, self.prepared = recipe, run_dir, prepared
        self.record = RunRecord()
        self.tracked: set[int] = set()  # steps whose metrics MLflow has
        self.state_file = run_dir / "run.json"
        self.state: dict[str, Any] = json.loads(self.state_file.read_text()) if self.state_file.exists() else {}
        if self.state.get("data", prepared.fingerprint) != prepared.fingerprint:
            raise DataError(
                f"data.source={recipe.data.source} no longer gives the text that run.name={recipe.run.name} began with "
                f"(its fingerprint was {self.state['data']}); restore it, or choose another run.name"
            )
        if self.state:  # what is known of a run that goes on, should nothing more be heard of it
            for row in read_metrics(run_dir, up_to=sys.maxsize):
                self.record.add(row)

    def run(self) -> int:
        """Start everything, train, write the summary; 0 if all steps were done, 1 if not."""
        log = self.run_dir / "logs" / "driver.log"
        with quiet_terminal(log) as terminal, RunLine(terminal) as line:
            self.line = line
            line.say(f"run      {self.run_dir}")
            train, held_out = self.prepared.train, self.prepared.held_out
            line.say(f"data     {train.num_bytes:,} bytes to train on, {held_out.num_bytes:,} held out")
            line.wait("starting MLflow and Ray …")
            cluster = self.recipe.cluster
            self.tracker = Tracker(
                self.recipe.tracking.uri,
                self.recipe.tracking.experiment,
                run_dir=self.run_dir,
                run_name=self.recipe.run.name,
                run_id=self.state.get("mlflow_run_id"),
            )
            with RaySession(
                cluster.address,
                workers=cluster.workers,
                cpus_per_worker=cluster.cpus_per_worker,
                gpus_per_worker=cluster.gpus_per_worker,
                log_dir=self.run_dir / "logs",
                timeout_s=cluster.start_timeout,
            ):
                mlflow_run_id = self.tracker.start(self.recipe.model_dump())
                (self.run_dir / RESOLVED_RECIPE).write_text(self.recipe.resolved_yaml())
                self._remember(mlflow_run_id=mlflow_run_id, data=self.prepared.fingerprint)
                self.tracked = self.tracker.steps_of("loss")
                try:
                    error = self._train()
                except BaseException as unexpected:
                    self._summarise("failed", unexpected)
                    self.tracker.finish("failed")
                    raise
            return self._finish(error, log)

    def _train(self) -> BaseException | None:
        cluster = self.recipe.cluster
        attempt = self.state.get("attempts", 0) + 1
        self._remember(attempts=attempt)
        plural = "s" if cluster.workers > 1 else ""
        self.line.wait(f"starting {cluster.workers} worker{plural} …")
        resources = {"CPU": cluster.cpus_per_worker}
        if cluster.gpus_per_worker:
            resources["GPU"] = cluster.gpus_per_worker
        try:
            run_workers(
                _work,
                {
                    "recipe": recipe_for_workers(self.recipe),
                    "run_dir": str(self.run_dir),
                    "prepared": str(self.prepared.folder.resolve()),
                },
                workers=cluster.workers,
                resources_per_worker=resources,
                backend="nccl" if cluster.gpus_per_worker else "gloo",
                attempt_dir=self.run_dir / "ray" / f"attempt-{attempt}",
                max_failures=cluster.max_failures,
                on_message=self._hear,
                on_silence=self.line.silence,
            )
        except (WorkersFailed, ClusterError, KeyboardInterrupt) as error:
            return error
        return None

    def _hear(self, message: dict[str, Any]) -> None:
        """A message from the workers, in the listening thread."""
        if message["kind"] == "failure":
            rank, reason = next(iter(message["errors"].items()))
            self.line.say(f"worker {rank} failed: {reason}")
        elif "start" in message:
            for note in message["notes"]:
                self.line.say(note)
            if message["settled"]:
                self.tracker.tag(message["settled"])
            self.line.begin(message["start"], message["steps"])
            self.record.steps = message["start"]
            for row in read_metrics(self.run_dir, up_to=message["start"]):
                if row["step"] not in self.tracked:  # its report was lost with a worker or with a driver
                    self._take(row)
        else:
            for row in message["history"]:
                metrics = self._take(row)
                if "bits_per_byte" in row:
                    self.line.update({**row, **metrics})
            self.line.update({k: v for k, v in {**row, **metrics}.items() if k != "bits_per_byte"})

    def _take(self, row: dict[str, Any]) -> dict[str, float]:
        """Record a step here and, unless it is there, in MLflow; its metrics."""
        metrics = self.record.add(row)
        if row["step"] not in self.tracked:
            self.tracker.log(row["step"], metrics)
            self.tracked.add(row["step"])
        folder = Path(row.get("checkpoint", ""))
        if "checkpoint" in row and folder.is_dir():
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            self.tracker.checkpoint(folder, row["step"], size)
        return metrics

    def _finish(self, error: BaseException | None, log: Path) -> int:
        record = self.record
        if record.checkpoint is None:
            store = CheckpointStore(self.run_dir / "checkpoints")
            newest = store.newest_good(lambda damaged: self.line.say(str(damaged)))
            record.checkpoint = str(newest) if newest else None
        status = "failed" if error else "done"
        if record.loss:
            self.tracker.figure(
                "learning_curve",
                learning_curve([*record.loss.items()], [*record.held_out.items()], self.recipe.run.name),
            )
        self._summarise(status, error)
        self.tracker.artifact(self.run_dir / RESOLVED_RECIPE)
        for problem in self.tracker.finish(status):
            self.line.say(problem)
        if isinstance(error, KeyboardInterrupt):
            self.line.say(f"interrupted after step {record.steps}; go on with run.resume=true")
            raise error
        if error:
            last = f"; the last good checkpoint is {record.checkpoint}" if record.checkpoint else ""
            self.line.say(f"failed after step {record.steps}: {error}{last}; logs in {log.parent}")
            return 1
        self._say_what_next()
        return 0

    def _summarise(self, status: str, error: BaseException | None) -> None:
        summary = {
            "status": status,
            "steps": self.record.steps,
            "metrics": self.record.metrics,
            "mlflow_run_id": self.state["mlflow_run_id"],
            "checkpoint": self.record.checkpoint,
        }
        if error:
            is_signal = isinstance(error, SystemExit)  # the session makes one of SIGTERM: its text is a number
            summary["error"] = "ended by SIGTERM" if is_signal else str(error) or type(error).__name__
        _write_json(self.run_dir / "summary.json", summary)

    def _say_what_next(self) -> None:
        say, record = self.line.say, self.record
        if "bits_per_byte" in record.metrics:
            compared = ""
            text = self.prepared.held_out_text_path
            if text.stat().st_size <= _XZ_LIMIT:
                compared = f" (xz -9 on the same text: {xz_bits_per_byte(text):.2f})"
            say(f"done     {record.metrics['bits_per_byte']:.3f} bits per held-out byte{compared}")
        uri, bin_dir = self.tracker.uri, shown_path(Path(sys.executable).parent)
        checkpoint = shlex.quote(shown_path(Path(record.checkpoint or "")))
        say("next")
        ui = f"{bin_dir}/mlflow ui --backend-store-uri {shlex.quote(uri)}"
        say(f"  look      {uri if uri.startswith('http') else ui}")
        say(f'  sample    {bin_dir}/mmada generate {checkpoint} "The "')
        say(f"  export    {bin_dir}/mmada export {checkpoint} my-model")
        more = self.recipe.train.steps * 2
        say(f"  go on     the same command with run.name={self.recipe.run.name} run.resume=true train.steps={more}")

    def _remember(self, **values: Any) -> None:
        self.state |= values
        _write_json(self.state_file, self.state)


def recipe_for_workers(recipe: Recipe) -> dict[str, Any]:
    """The recipe with the folders that it names absolute: workers have a working directory of their own."""
    values = recipe.model_dump()
    for section, key in (("data", "tokenizer"), ("model", "entropy_model")):
        named = values[section][key]
        if named is not None and (folder := Path(named).expanduser()).is_dir():
            values[section][key] = str(folder.resolve())
    return values


def shown_path(path: Path) -> str:
    """A path as the user would type it here: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def xz_bits_per_byte(text: Path) -> float:
    """What ``xz -9`` needs for the text, in bits per byte."""
    content = text.read_bytes()
    return 8 * len(lzma.compress(content, preset=9)) / len(content)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    aside.replace(path)
