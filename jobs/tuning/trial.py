"""One trial: a whole run of the recipe with other values for some keys, in the process of Ray Tune's actor.

A trial's folder holds its attempts, each the folder of an ordinary run. There is one, unless population-based
training has it go on from another trial's checkpoint: then a new attempt begins, with that checkpoint as its own
first one. After a pause or a crash the newest attempt goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.checkpoints import CheckpointStore
from cluster.errors import ClusterError
from cluster.terminal import quiet_terminal
from cluster.tracking import Tracker, flatten
from cluster.trial_actor import Channel
from jobs.driver import Driver, TrackedAs
from jobs.progress import read_metrics
from jobs.recipe import RESOLVED_RECIPE, Recipe, recipe_of
from jobs.recipe_checks_tune import with_settings
from jobs.recipe_schema_tune import DistributionSection
from jobs.tuning.book import ENDED, TrialEntry, read_book, trial_name
from jobs.tuning.room import wait_for_room
from jobs.tuning.space import settings_of

ORIGIN = "origin.json"  # in an attempt's folder: what it began from and with
CARRIED = "carried"  # in a trial's folder: checkpoints, by attempt, that another trial may still go on from
LOCK = "lock"  # in a trial's folder: held by the process that runs it
LONGEST_END_S = 180.0  # of the process that ran the trial before a pause
_LOOK_EVERY_S = 0.5


def run_trial(drawn: dict[str, Any], config: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """The work of a trial; its last report: ``status`` done, failed or stopped, ``step``, and the metric.

    ``config``: ``sweep`` (the sweep's folder), ``values`` of the recipe, ``space``, ``verb``, ``metric``, ``carries``
    (how many checkpoints each trial keeps for others to go on from; 0: they do not), ``uri`` and ``sweep_run`` of
    MLflow, ``name`` of the sweep, ``cwd``, ``address`` of Ray, ``start_timeout``.
    """
    os.chdir(config["cwd"])
    sys.path[:0] = [config["cwd"]] if config["cwd"] not in sys.path else []
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config["start_timeout"])
    identity, trials = read_book(Path(config["sweep"]))
    (entry,) = [entry for entry in trials.values() if entry.tune_id == channel.trial]
    if entry.status in ENDED:  # and the driver that heard it died before Tune wrote it down
        known = {} if entry.value is None else {config["metric"]: entry.value}
        return {"status": entry.status, "step": entry.step, "error": entry.error, **known}
    trial = _Trial(entry, identity, drawn, config, channel)
    with trial.alone():
        return trial.run()


class _Trial:
    """The newest attempt of a trial, run to its end or until it is told to stop."""

    def __init__(
        self, entry: TrialEntry, identity: str, drawn: Mapping[str, Any], config: dict[str, Any], channel: Channel
    ) -> None:
        space = {key: DistributionSection.model_validate(value) for key, value in config["space"].items()}
        self.settings = settings_of(space, drawn)
        self.number, self.identity, self.config, self.channel = entry.number, identity, config, channel
        self.sweep, self.metric = Path(config["sweep"]), config["metric"]
        self.folder = self.sweep / "trials" / entry.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.known = entry.step  # Tune has heard of all up to there
        self.first = entry.earlier[0]["settings"] if entry.earlier else self.settings
        self.reported = -1

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for the trial's process before a pause, which may still be ending, and keep others out.

        Raises ClusterError when it does not end.
        """
        deadline = time.monotonic() + LONGEST_END_S
        with open(self.folder / LOCK, "w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ClusterError(f"another process runs {self.folder.name} in {self.sweep}") from None
                    time.sleep(_LOOK_EVERY_S)
            yield

    def run(self) -> dict[str, Any]:
        """Run; the trial's last report."""
        attempt, is_new = self._attempt()
        recipe = self._recipe(attempt, resume=not is_new or self._is_takeover)
        log = quiet_terminal(self.folder / "trial.log")
        with log, self._tracked(attempt) as tracker:
            if is_new and self._is_takeover:
                assert self.channel.restored is not None
                tracker.changed(self.channel.restored["step"], _plain(self.settings))
            self.attempt = attempt
            self._begin_to_carry()
            prepare = prepare_verb(self.config["verb"])
            driver: Driver = prepare(recipe)(recipe.run_dir.resolve())
            workers = wait_for_room(recipe, driver.resized, self.channel.stop)
            if workers != recipe.cluster.workers:
                recipe = driver.resized(recipe, workers)
                driver = prepare(recipe)(recipe.run_dir.resolve())
            (recipe.run_dir / "logs").mkdir(parents=True, exist_ok=True)
            driver.tracked_as = TrackedAs(
                uri=self.config["uri"],
                name=f"attempt-{attempt}",
                parent=tracker.run_id or "",
                identity=f"{self.identity}/{self.number}/{attempt}",
                tags={"mmada.kind": "attempt", "mmada.sweep": self.config["name"], "mmada.trial": self.number},
            )
            driver.listener, driver.stop = self._heard, self.channel.stop
            self._tell_again(recipe.run_dir)
            try:
                driver.run()
            except KeyboardInterrupt:
                self.channel.stop.set()
            summary = json.loads((recipe.run_dir / "summary.json").read_text())
            self._told = summary["status"]
            last = {"status": summary["status"], "step": summary["steps"], "error": summary.get("error")}
            values = driver.record.curves.get(self.metric, {})
            values = getattr(driver, "accuracy", values) if self.metric == "held_out_accuracy" else values
            if values and max(values) == summary["steps"]:
                last[self.metric] = values[max(values)]
                self._log(last["step"], last[self.metric])
            return last | {"mlflow_run_id": tracker.run_id, "checkpoint": summary["checkpoint"]}

    def _heard(self, row: dict[str, Any]) -> None:
        """A step, or an evaluation; Tune and the trial's own run in MLflow hear of those that have the metric."""
        value, step = row.get(self.metric), row["step"]
        if value is None or step <= self.reported or not math.isfinite(value):
            return
        self.reported = step
        if self.config["carries"] and "checkpoint" in row:
            self._carry(Path(row["checkpoint"]))
        self._log(step, value)
        if step < self._steps:  # the last comes with the end
            self.channel.report({"step": step, self.metric: value, "mlflow_run_id": self.tracker.run_id})

    def _log(self, step: int, value: float) -> None:
        """Tell the trial's own run in MLflow, unless it has been told."""
        if step not in self.logged:
            self.tracker.log(step, {self.metric: value})
            self.logged.add(step)

    def _tell_again(self, run_dir: Path) -> None:
        """Evaluations of an earlier start that Tune has not heard of: the process ended with them in hand."""
        for row in read_metrics(run_dir, up_to=sys.maxsize):
            if row["step"] > self.known:
                self._heard(row)

    def _carry(self, checkpoint: Path) -> None:
        """Keep a checkpoint (its files, not copies of them) for a trial that goes on from here.

        Where steps are so fast that newer ones have replaced it already, the newest that leaves something to do is
        kept: without any, a trial that goes on from here would begin anew.
        """
        if not self._keep(checkpoint):
            newer = [each for each in CheckpointStore(checkpoint.parent).list() if _step_of(each) < self._steps]
            any(self._keep(each) for each in reversed(newer))
        for old in self._carried()[: -self.config["carries"]]:
            shutil.rmtree(old, ignore_errors=True)

    def _keep(self, checkpoint: Path) -> bool:
        """Whether it was still there."""
        kept = self.folder / CARRIED / str(self.attempt) / checkpoint.name
        if not kept.exists():
            aside = kept.with_suffix(".aside")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                shutil.copytree(checkpoint, aside, copy_function=_link)
            except (FileNotFoundError, shutil.Error):
                if checkpoint.is_dir():  # it is another fault
                    raise
                shutil.rmtree(aside, ignore_errors=True)
                return False
            aside.rename(kept)
        self.channel.pointer = self._pointer(kept)
        return True

    def _begin_to_carry(self) -> None:
        """Until it has a checkpoint of its own here, this attempt is where it began or where it had come to."""
        own = [each for each in self._carried() if each.parent.name == str(self.attempt)]
        if own:
            self.channel.pointer = self._pointer(own[-1])
        elif self.channel.restored is not None:
            self.channel.pointer = self.channel.restored

    def _carried(self) -> list[Path]:
        """Checkpoints that are kept, oldest first."""
        found = self.folder.glob(f"{CARRIED}/*/step-*")
        return sorted(
            (each for each in found if each.suffix == ""), key=lambda each: (int(each.parent.name), each.name)
        )

    def _pointer(self, kept: Path) -> dict[str, Any]:
        return {"trial": self.number, "step": _step_of(kept), "checkpoint": str(kept)}

    @property
    def _is_takeover(self) -> bool:
        restored = self.channel.restored
        return restored is not None and restored["trial"] != self.number

    def _attempt(self) -> tuple[int, bool]:
        """The attempt that goes on, or the next one, made ready; whether it has just been made."""
        origin = {"settings": self.settings, "from": self.channel.restored if self._is_takeover else None}
        made = sorted(int(path.name.partition("-")[2]) for path in self.folder.glob("attempt-*"))
        newest = made[-1] if made else 0
        if newest:
            file = self.folder / f"attempt-{newest}" / ORIGIN
            before = json.loads(file.read_text()) if file.exists() else None
            is_its_own = not self._is_takeover and before is not None and before["settings"] == self.settings
            if before == origin or is_its_own:
                begun = (self.folder / f"attempt-{newest}" / RESOLVED_RECIPE).exists()
                return newest, not begun
            newest = newest if before is not None else newest - 1  # one that was not made ready is made anew
        attempt = self.folder / f"attempt-{newest + 1}"
        shutil.rmtree(attempt, ignore_errors=True)
        attempt.mkdir()
        if self._is_takeover:
            assert self.channel.restored is not None
            donor = Path(self.channel.restored["checkpoint"])
            shutil.copytree(donor, attempt / "checkpoints" / donor.name, copy_function=_link)
        (attempt / ORIGIN).write_text(json.dumps(origin))
        return newest + 1, True

    def _recipe(self, attempt: int, resume: bool) -> Recipe:
        values = with_settings(self.config["values"], self.settings)
        run = {"dir": str(self.folder), "name": f"attempt-{attempt}", "resume": resume}
        values["run"] = {**values["run"], **run}
        values["cluster"] = {**(values.get("cluster") or {}), "address": self.config["address"]}
        recipe = recipe_of(values)
        if self.config["carries"]:  # this process hears of a checkpoint some seconds after it was written
            kept = max(recipe.train.keep_checkpoints, self.config["carries"])
            train = recipe.train.model_copy(update={"keep_checkpoints": kept})
            recipe = recipe.model_copy(update={"train": train})
        if self.config["verb"] == "ppo":
            from jobs.recipe_checks_ppo import completed

            recipe = completed(recipe)
        self._steps = recipe.ppo.iterations if self.config["verb"] == "ppo" and recipe.ppo else recipe.train.steps
        data = self.folder / ".data"  # text is prepared once for all trials
        if not data.exists():
            data.symlink_to(self.sweep.parent / ".data")
        return recipe

    @contextlib.contextmanager
    def _tracked(self, attempt: int) -> Iterator[Tracker]:
        """The trial's own run in MLflow, between the sweep's and the attempts'."""
        tracker = self.tracker = Tracker(
            self.config["uri"],
            self.config["experiment"],
            run_dir=self.folder,
            run_name=trial_name(self.number),
            parent_run_id=self.config["sweep_run"],
            identity=f"{self.identity}/{self.number}",
            tags={"mmada.kind": "trial", "mmada.sweep": self.config["name"], "mmada.attempts": attempt},
            system_metrics_seconds=0,
        )
        self._told = "failed"
        tracker.start(self.first)
        self.logged = tracker.steps_of(self.metric)
        try:
            yield tracker
        finally:
            tracker.finish(self._told)


def prepare_verb(verb: str) -> Callable[[Recipe], Callable[[Path], Driver]]:
    """What prepares the data of a recipe and then makes its driver."""
    if verb == "ppo":
        from jobs.ppo import prepare as prepare_ppo

        return prepare_ppo
    from jobs.train import prepare

    return prepare


def _plain(settings: Mapping[str, Any]) -> dict[str, float | str]:
    """Settings by names with dots, numbers as such."""
    found: dict[str, float | str] = {**flatten(settings)}
    for name, text in found.items():
        with contextlib.suppress(ValueError):
            found[name] = float(text)
    return found


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _link(source: str, target: str) -> None:
    """A second name for a file, or where the disk has none, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
