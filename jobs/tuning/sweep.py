"""``mmada tune``: the driver of a sweep. Ray Tune decides, trials run, this listens, counts and writes it down."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import ray

from cluster.errors import ClusterError
from cluster.exported_metrics import SweepMetrics
from cluster.search import SearchSettings, run_search
from cluster.session import RaySession
from cluster.terminal import quiet_terminal
from cluster.tracking import Tracker
from cluster.tracking_tree import end_runs_below
from jobs.driver import shown_path
from jobs.recipe import RESOLVED_RECIPE
from jobs.recipe_checks_tune import Search
from jobs.run_record import error_words
from jobs.tuning.book import BOOK, Book
from jobs.tuning.results import BEST, TRIALS, figures, write_best, write_trials
from jobs.tuning.room import trials_at_once
from jobs.tuning.screen import SweepScreen, settings_words
from jobs.tuning.trial import prepare_verb, run_trial

STATE = "ray"  # Ray Tune's own folder in the sweep's


def run(search: Search) -> int:
    """Run a search that ``jobs.recipe_checks_tune`` has passed; the exit code.

    Raises RecipeError, DataError or ClusterError before anything has started.
    """
    run_dir = search.recipe.run_dir.resolve()
    is_new = not run_dir.exists()
    # What trials learn from is prepared once, here, where its mistakes are still the user's.
    from jobs.recipe import recipe_of
    from jobs.tuning.space import corners

    prepare_verb(search.settings.verb)(recipe_of(search.values_with(next(corners(search.space)))))
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        return Sweep(search, run_dir).run()
    except BaseException:
        if is_new and not (run_dir / RESOLVED_RECIPE).exists():
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


class Sweep:
    """One sweep, seen from the process that the user started. It is the search's listener."""

    def __init__(self, search: Search, run_dir: Path) -> None:
        self.search, self.run_dir = search, run_dir
        self.recipe, self.settings = search.recipe, search.settings

    def run(self) -> int:
        """Search, write what was found; 0 when all trials have ended and one of them well, else 1."""
        log = self.run_dir / "logs" / "driver.log"
        search = self.search
        with (
            quiet_terminal(log) as terminal,
            SweepScreen(terminal, search.trials, search.metric, search.mode) as screen,
        ):
            self.screen = screen
            screen.say(f"sweep    {self.run_dir}")
            keys = ", ".join(search.space)
            screen.say(f"search   {search.trials} trials ({self.settings.how}) of {keys}")
            screen.wait("starting MLflow and Ray …")
            cluster = self.recipe.cluster
            with RaySession(
                cluster.address,
                workers=cluster.workers * self._at_once(),
                cpus_per_worker=cluster.cpus_per_worker,
                gpus_per_worker=cluster.gpus_per_worker,
                log_dir=self.run_dir / "logs",
                timeout_s=cluster.start_timeout,
                extra_cpus=self._extra()[0],
                extra_gpus=self._extra()[1],
                extra_actors=self._extra()[2],
                queue_timeout_s=cluster.queue_timeout,
                on_wait=screen.wait,
            ) as session:
                concurrent = trials_at_once(search, None if cluster.address is None else ray.nodes())
                self.book = Book(self.run_dir)
                self.tracker = self._make_tracker()
                self.run_id = self.tracker.start(self.recipe.sections())
                (self.run_dir / RESOLVED_RECIPE).write_text(self.recipe.resolved_yaml())
                screen.say(f"trials   {concurrent} at a time, {search.metric} is to be {search.extreme}")
                error: BaseException | None = None
                try:
                    with SweepMetrics(self.recipe.run.name, search.metric) as self.exported:
                        self._search(concurrent, session.gcs_address)
                except (KeyboardInterrupt, ClusterError, SystemExit) as ended:
                    error = ended
                except Exception as unexpected:
                    self._finish(unexpected)
                    raise
            # The trials' processes are gone with the session; some, today or in an earlier start, before they said so.
            done = {entry.number for entry in self.book.with_status("done")}
            end_runs_below(self.tracker.uri, self.recipe.tracking.experiment, self.book.identity, done)
            return self._finish(error)

    # What the search tells, in its thread.

    def started(self, trial: str, drawn: dict[str, Any]) -> None:
        """A trial runs."""
        from jobs.tuning.space import settings_of

        known = self.book.find(trial)
        before = None if known is None else known.settings
        entry = self.book.start(trial, settings_of(self.search.space, drawn))
        if before is not None and before != entry.settings:
            self.screen.say(
                f"{entry.name} goes on from a better trial after step {entry.step} with {settings_words(entry)}"
            )
        self.screen.refresh(self.book)

    def reported(self, trial: str, report: dict[str, Any]) -> None:
        """An evaluation, or a trial's last word."""
        self.book.report(trial, report, self.search.metric)
        self._export()
        self.screen.refresh(self.book)

    def paused(self, trials: set[str]) -> None:
        """These trials wait for their turn."""
        self.book.pause(trials)
        self.screen.refresh(self.book)

    def stopping(self) -> None:
        """The search was interrupted, and its trials are given some seconds."""
        self.screen.wait("stopping the trials …")

    def ended(self, trial: str, drawn: dict[str, Any], error: str | None) -> None:
        """A trial will not run again; one whose process never came up has not even started."""
        if self.book.find(trial) is None:
            self.started(trial, drawn)
        entry = self.book.end(trial, error)
        self._export()
        self.screen.ended(self.book, entry)
        best = self.book.best(self.search.mode)
        done = len(self.book.with_status("done", "stopped", "failed"))
        if best is not None and best.value is not None:
            self.tracker.log(done, {f"best.{self.search.metric}": best.value, "best.trial": best.number})
        self.tracker.log(done, {"trials.done": len(self.book.with_status("done"))})

    # The pieces.

    def _export(self) -> None:
        """What Prometheus sees of the sweep."""
        counts = {each: len(self.book.with_status(each)) for each in ("running", "done", "stopped", "failed")}
        self.exported.trials(pending=max(0, self.search.trials - sum(counts.values())), **counts)
        best = self.book.best(self.search.mode)
        if best is not None and best.value is not None:
            self.exported.best(best.value)

    def _search(self, concurrent: int, address: str | None) -> None:
        search, own = self.search, self.settings
        settings = SearchSettings(
            metric=search.metric,
            mode=search.mode,
            search=own.search,
            scheduler=own.scheduler,
            trials=search.trials,
            concurrent=concurrent,
            grace_period=search.grace_period,
            reduction_factor=own.reduction_factor,
            most_steps=search.most_steps,
            seed=own.seed,
        )
        config = {
            "sweep": str(self.run_dir),
            "name": self.recipe.run.name,
            "values": search.values,
            "space": {key: section.model_dump(exclude_none=True) for key, section in search.space.items()},
            "verb": own.verb,
            "metric": search.metric,
            "carries": self._carries(),
            "uri": self.tracker.uri,
            "experiment": self.recipe.tracking.experiment,
            "sweep_run": self.run_id,
            "cwd": os.getcwd(),
            "address": address,
            "start_timeout": self.recipe.cluster.start_timeout,
        }
        run_search(search.dimensions, settings, run_trial, config, self.run_dir / STATE, self)

    def _carries(self) -> int:
        """Checkpoints of a trial that another may still go on from: of the last two comparisons, and what follows."""
        every = self.recipe.train.evaluate_every
        return 2 * -(-self.search.grace_period // every) + 2 if self.settings.scheduler == "pbt" else 0

    def _make_tracker(self) -> Tracker:
        own = self.recipe.tracking
        return Tracker(
            own.uri,
            own.experiment,
            run_dir=self.run_dir,
            run_name=self.recipe.run.name,
            identity=self.book.identity,
            tags={"mmada.kind": "sweep"},
        )

    def _at_once(self) -> int:
        """Trials for which the session must have room from the start, or for which it waits."""
        cluster, asked = self.recipe.cluster, self.settings.max_concurrent
        if cluster.address is None:
            return trials_at_once(self.search, None)
        return min(asked, self.search.trials) if asked and cluster.queue_timeout else 1

    def _extra(self) -> tuple[float, float, int]:
        """CPUs and GPUs of all rollout actors together, and how many those are."""
        own = self.recipe.ppo
        if self.settings.verb != "ppo" or own is None:
            return 0.0, 0.0, 1
        actors = self._at_once() * own.rollout_workers
        return actors * own.rollout_cpus, actors * own.rollout_gpus, actors

    def _finish(self, error: BaseException | None) -> int:
        search, book, say = self.search, self.book, self.screen.say
        entries = [entry for _, entry in sorted(book.trials.items())]
        best = book.best(search.mode)
        is_over = error is None and len(book.with_status("done", "stopped", "failed")) >= search.trials
        write_trials(self.run_dir / TRIALS, entries, search.metric)
        if best is not None:
            write_best(self.run_dir / BEST, search, best)
        status = "done" if is_over and best is not None else "failed"
        self._summarise(status, error)
        for name, figure in figures(search, book).items():
            self.tracker.figure(name, figure)
        for name in (RESOLVED_RECIPE, TRIALS, BEST, BOOK):
            if (self.run_dir / name).exists():
                self.tracker.artifact(self.run_dir / name)
        if best is not None:
            self.tracker.tag({"mmada.best_trial": best.name, "mmada.best_run": best.mlflow_run_id})
        for problem in self.tracker.finish("stopped" if isinstance(error, KeyboardInterrupt) else status):
            say(problem)
        again = f"go on with run.resume=true run.name={self.recipe.run.name}"
        if isinstance(error, KeyboardInterrupt | SystemExit):
            ended = len(book.with_status("done", "stopped", "failed"))
            say(f"interrupted with {ended} of {search.trials} trials ended; {again}")
            raise error
        if error is not None:
            say(f"failed: {error}; {again}; logs in {self.run_dir / 'logs'}")
            return 1
        if best is None:
            failed = book.with_status("failed")
            why = f"; the first failed with: {failed[0].error}" if failed else ""
            say(f"failed: no trial came to its end{why}; logs in {self.run_dir / 'trials'}")
            return 1
        say(f"done     {best.name} is best: {search.metric} {best.value:.4f} with {settings_words(best)}")
        self._say_what_next()
        return 0

    def _summarise(self, status: str, error: BaseException | None) -> None:
        best = self.book.best(self.search.mode)
        counts = {each: len(self.book.with_status(each)) for each in ("done", "stopped", "failed", "running")}
        summary = {
            "status": status,
            "trials": counts,
            "metric": self.search.metric,
            "mode": self.search.mode,
            "best": None
            if best is None
            else {"trial": best.number, "value": best.value, "step": best.step, "settings": best.settings},
            "mlflow_run_id": self.run_id,
        }
        if error is not None:
            summary["error"] = error_words(error)
        (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    def _say_what_next(self) -> None:
        say, uri, bin_dir = self.screen.say, self.tracker.uri, shown_path(Path(sys.executable).parent)
        ui = f"{bin_dir}/mlflow ui --backend-store-uri {shlex.quote(uri)}"
        say("next")
        say(f"  look      {uri if uri.startswith('http') else ui}")
        say(f"  table     {shown_path(self.run_dir / TRIALS)}")
        say(f"  train     {bin_dir}/mmada {self.settings.verb} {shlex.quote(shown_path(self.run_dir / BEST))}")
