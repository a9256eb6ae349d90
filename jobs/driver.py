"""The driver's side of any run on workers: Ray, MLflow, the run's folder, what is heard and what is said.

A kind of run (``jobs.train``, ``jobs.ppo``) says what it learns from, what its workers do, and how its metrics read.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoints import CheckpointStore
from cluster.errors import ClusterError, Stopped
from cluster.exported_metrics import RunMetrics
from cluster.launch import WorkersFailed, run_workers
from cluster.recovery import Policy
from cluster.session import RaySession
from cluster.supervision import Event, supervise
from cluster.terminal import quiet_terminal
from cluster.tracking import Tracker
from jobs.console import RunLine
from jobs.progress import read_metrics
from jobs.recipe import RESOLVED_RECIPE, Recipe
from jobs.run_record import RunRecord, error_words
from jobs.setbacks import Setbacks, counted
from jobs.shrinking import possible_workers
from jobs.worker_recipe import recipe_for_workers
from mmada.errors import DataError


@dataclass(frozen=True)
class TrackedAs:
    """Where a run stands in MLflow that is part of something larger. ``identity`` finds it again without its id."""

    uri: str
    name: str
    parent: str
    identity: str
    tags: dict[str, Any]


def start(recipe: Recipe, make: Callable[[Path], Driver]) -> int:
    """Make the run's folder and its driver, and run it; the exit code.

    What fails before the run has begun leaves no folder behind.
    """
    run_dir = recipe.run_dir.resolve()
    is_new = not run_dir.exists()
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        return make(run_dir).run()
    except BaseException:
        if is_new and not (run_dir / RESOLVED_RECIPE).exists():
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


class Driver:
    """One run, seen from the process that the user started. Kinds of runs derive from it."""

    verb = "train"
    kinds: tuple[str, ...] = ("worker",)  # of processes that may fail
    tracked_metric = "loss"  # one that every step has: what MLflow has it for, it has all of
    steps_key = "train.steps"  # what the user raises to go on
    extra_cpus = 0.0  # of actors beside the workers
    extra_gpus = 0.0
    extra_actors = 1
    tracked_as: TrackedAs | None = None  # None: a run of its own
    listener: Callable[[dict[str, Any]], None] | None = None  # hears of every step and evaluation
    stop: threading.Event | None = None  # set from outside: come to an orderly end before the last step

    def __init__(self, recipe: Recipe, run_dir: Path, fingerprint: str, source: str) -> None:
        """``fingerprint`` of what is learned from, named by ``source`` (``data.source=stdlib``).

        Raises DataError when the run began with something else.
        """
        self.recipe, self.run_dir, self.fingerprint = recipe, run_dir, fingerprint
        self.record = self.make_record()
        self.tracked: set[int] = set()  # steps whose metrics MLflow has
        self.state_file = run_dir / "run.json"
        self.state: dict[str, Any] = json.loads(self.state_file.read_text()) if self.state_file.exists() else {}
        if self.state.get("data", fingerprint) != fingerprint:
            raise DataError(
                f"{source} no longer gives what run.name={recipe.run.name} began with "
                f"(its fingerprint was {self.state['data']}); restore it, or choose another run.name"
            )
        self.setbacks = Setbacks(recipe.cluster.workers, self.state.get("restarts", 0))
        if self.state:  # what is known of a run that goes on, should nothing more be heard of it
            for row in read_metrics(run_dir, up_to=sys.maxsize):
                self.record.add(row)

    # What a kind of run says for itself.

    def make_record(self) -> RunRecord:
        """An empty record of the kind that it keeps."""
        return RunRecord()

    def announce(self) -> None:
        """Say what is learned from, and by whom."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        raise NotImplementedError

    def work(self) -> Callable[[dict[str, Any]], None]:
        """What every worker runs, given ``worker_config``."""
        raise NotImplementedError

    def worker_config(self) -> dict[str, Any]:
        """Plain values for the workers, beside the recipe and the run's folder."""
        return {}

    def resized(self, recipe: Recipe, workers: int) -> Recipe:
        """The recipe for fewer workers, or the same. Raises RecipeError where so many cannot do it."""
        raise NotImplementedError

    @contextmanager
    def beside_the_workers(self) -> Iterator[None]:
        """Whatever runs while the workers do."""
        yield

    def words(self, row: dict[str, Any]) -> list[str]:
        """What the terminal shows of a step."""
        raise NotImplementedError

    def stays(self, row: dict[str, Any]) -> bool:
        """Whether a step's line stays on the terminal."""
        return False

    def before(self, row: dict[str, Any]) -> list[str]:
        """Lines that stand before a step's own, such as what begins with it."""
        return []

    def heard(self, row: dict[str, Any]) -> None:
        """A step's metrics have come, for the first time."""

    def figures(self) -> dict[str, Any]:
        """Matplotlib figures of the run, by name."""
        return {}

    def closing(self) -> None:
        """Say how it ended, when all steps are done."""

    def summary(self, is_done: bool) -> dict[str, Any]:
        """What ``summary.json`` holds beside what every run's does; ``is_done``: all steps are."""
        return {}

    # The run.

    def run(self) -> int:
        """Start everything, train, write the summary; 0 if all steps were done, 1 if not."""
        log = self.run_dir / "logs" / "driver.log"
        with quiet_terminal(log) as terminal, RunLine(terminal, self.words) as line:
            self.line = line
            line.say(f"run      {self.run_dir}")
            self.announce()
            line.wait("starting MLflow and Ray …")
            cluster = self.recipe.cluster
            self.tracker = self._make_tracker()
            session = RaySession(
                cluster.address,
                workers=cluster.workers,
                cpus_per_worker=cluster.cpus_per_worker,
                gpus_per_worker=cluster.gpus_per_worker,
                log_dir=self.run_dir / "logs",
                timeout_s=cluster.start_timeout,
                extra_cpus=self.extra_cpus,
                extra_gpus=self.extra_gpus,
                extra_actors=self.extra_actors,
                queue_timeout_s=cluster.queue_timeout,
                on_wait=line.wait,
            )
            with session, RunMetrics(self.recipe.run.name, self.verb, self.kinds) as self.exported:
                mlflow_run_id = self.tracker.start(self.recipe.sections())
                if reason := self.tracker.waits_because:
                    line.say(f"mlflow   {reason}; the run goes on, and what it reports is kept and sent later")
                (self.run_dir / RESOLVED_RECIPE).write_text(self.recipe.resolved_yaml())
                self._remember(mlflow_run_id=mlflow_run_id, data=self.fingerprint)
                self.tracked = self.tracker.steps_of(self.tracked_metric)
                try:
                    error = self._run_workers()
                except BaseException as unexpected:
                    self._summarise("failed", unexpected)
                    self.tracker.finish("failed")
                    raise
            return self._finish(error, log)

    def _make_tracker(self) -> Tracker:
        own, place = self.recipe.tracking, self.tracked_as
        return Tracker(
            own.uri if place is None else place.uri,
            own.experiment,
            run_dir=self.run_dir,
            run_name=self.recipe.run.name if place is None else place.name,
            run_id=self.state.get("mlflow_run_id"),
            parent_run_id=None if place is None else place.parent,
            identity=None if place is None else place.identity,
            tags={} if place is None else place.tags,
        )

    def _run_workers(self) -> BaseException | None:
        cluster = self.recipe.cluster
        sizes = possible_workers(self.recipe, self.resized)
        try:
            with self.beside_the_workers():
                supervise(
                    self._attempt,
                    Policy(cluster.max_failures, sizes, cluster.node_timeout),
                    cpus_per_worker=cluster.cpus_per_worker,
                    gpus_per_worker=cluster.gpus_per_worker,
                    tell=self._tell_of_setback,
                    while_waiting=self._stop_if_told,
                )
        except (WorkersFailed, ClusterError, KeyboardInterrupt, Stopped) as error:
            return error
        return None

    def _silence(self, seconds: float) -> None:
        self.line.silence(seconds)
        self._stop_if_told()

    def _stop_if_told(self) -> None:
        if self.stop is not None and self.stop.is_set():
            raise Stopped("told to stop")

    def _attempt(self, workers: int) -> None:
        """Run so many workers to the end of the run, or until one fails."""
        cluster = self.recipe.cluster
        attempt = self.state.get("attempts", 0) + 1
        self._remember(attempts=attempt)
        resources = {"CPU": cluster.cpus_per_worker}
        if cluster.gpus_per_worker:
            resources["GPU"] = cluster.gpus_per_worker
        self.line.wait(f"starting {counted(workers, 'worker')} …")
        run_workers(
            self.work(),
            {
                "recipe": recipe_for_workers(self.resized(self.recipe, workers)),
                "run_dir": str(self.run_dir),
                **self.worker_config(),
            },
            workers=workers,
            resources_per_worker=resources,
            backend="nccl" if cluster.gpus_per_worker else "gloo",
            attempt_dir=self.run_dir / "ray" / f"attempt-{attempt}",
            max_failures=0,
            on_message=self._hear,
            on_silence=self._silence,
        )

    def _tell_of_setback(self, event: Event) -> None:
        """Something was lost, or the run goes on after a loss."""
        self.line.say(self.setbacks.words(event))
        if tags := self.setbacks.tags(event):
            self._remember(restarts=self.setbacks.restarts)
            self.tracker.tag(tags)

    def _hear(self, message: dict[str, Any]) -> None:
        """A message from the workers, in the listening thread."""
        self._stop_if_told()
        if message["kind"] == "failure":
            rank, reason = next(iter(message["errors"].items()))
            self.line.say(f"worker {rank} failed: {reason}")
            self.exported.failed("worker")
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
            rows = [{**row, **self._take(row)} for row in message["history"]]
            for row in rows:
                self.exported.step(row)
                for words in self.before(row):
                    self.line.say(words)
                if self.stays(row) or row is rows[-1]:
                    self.line.update(row, stays=self.stays(row))

    def _take(self, row: dict[str, Any]) -> dict[str, float]:
        """Record a step here and, unless it is there, in MLflow; its metrics."""
        metrics = self.record.add(row)
        if row["step"] not in self.tracked:
            self.tracker.log(row["step"], metrics)
            self.tracked.add(row["step"])
            self.heard(row)
        folder = Path(row.get("checkpoint", ""))
        if "checkpoint" in row and folder.is_dir():
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            self.tracker.checkpoint(folder, row["step"], size)
        if self.listener is not None:
            self.listener(row)
        return metrics

    def _finish(self, error: BaseException | None, log: Path) -> int:
        record = self.record
        if record.checkpoint is None:
            store = CheckpointStore(self.run_dir / "checkpoints")
            newest = store.newest_good(lambda damaged: self.line.say(str(damaged)))
            record.checkpoint = str(newest) if newest else None
        status = "stopped" if isinstance(error, Stopped) else "failed" if error else "done"
        if record.curves:
            for name, figure in self.figures().items():
                self.tracker.figure(name, figure)
        self._summarise(status, error)
        self.tracker.artifact(self.run_dir / RESOLVED_RECIPE)
        for problem in self.tracker.finish(status):
            self.line.say(problem)
        if isinstance(error, KeyboardInterrupt):
            self.line.say(f"interrupted after step {record.steps}; go on with run.resume=true")
            raise error
        if isinstance(error, Stopped):
            self.line.say(f"stopped  after step {record.steps}: {error}")
            return 0
        if error:
            last = f"; the last good checkpoint is {record.checkpoint}" if record.checkpoint else ""
            self.line.say(f"failed after step {record.steps}: {error}{last}; logs in {log.parent}")
            return 1
        self.closing()
        self._say_what_next()
        return 0

    def _summarise(self, status: str, error: BaseException | None) -> None:
        summary = {
            "status": status,
            "steps": self.record.steps,
            "metrics": self.record.metrics,
            "mlflow_run_id": self.state["mlflow_run_id"],
            "checkpoint": self.record.checkpoint,
            "workers": self.setbacks.workers,
            "restarts": self.setbacks.restarts,
            **self.summary(error is None),
        }
        if error:
            summary["error"] = error_words(error)
        _write_json(self.run_dir / "summary.json", summary)

    def _say_what_next(self) -> None:
        say, record = self.line.say, self.record
        uri, bin_dir = self.tracker.uri, shown_path(Path(sys.executable).parent)
        checkpoint = shlex.quote(shown_path(Path(record.checkpoint or "")))
        say("next")
        ui = f"{bin_dir}/mlflow ui --backend-store-uri {shlex.quote(uri)}"
        say(f"  look      {uri if uri.startswith('http') else ui}")
        for line in self.what_next(f"{bin_dir}/mmada", checkpoint):
            say(f"  {line}")
        say(f"  go on     the same command with {self.how_to_go_on(checkpoint)}")

    def what_next(self, mmada: str, checkpoint: str) -> list[str]:
        """Commands to try on what has been learned."""
        return [f"export    {mmada} export {checkpoint} my-model"]

    def how_to_go_on(self, checkpoint: str) -> str:
        """What the user adds to the command to learn more."""
        return f"run.name={self.recipe.run.name} run.resume=true {self.steps_key}={self.steps * 2}"

    def _remember(self, **values: Any) -> None:
        self.state |= values
        _write_json(self.state_file, self.state)


def shown_path(path: Path) -> str:
    """A path as the user would type it here: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    aside.replace(path)
