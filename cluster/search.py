"""A search over trials with Ray Tune: what is drawn, who is stopped, and going on after a crash.

What a trial is stands in ``cluster.trial_actor``. Tune keeps its own state under ``folder``, written at every event,
and ``cluster.search_state`` copies of it that are whole, so that a search whose driver died goes on where it was.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune

from cluster.orphans import remove_orphaned_groups
from cluster.search_state import keep_whole, put_back
from cluster.trial_actor import TrialActor, TrialWork

EXPERIMENT = "tune"
COPIES = "copies"
LONGEST_CLEAN_UP_S = 120  # of a trial that is told to stop, before it is killed
LONGEST_STOP_S = 30  # of Tune, which gives trials in the midst of work ten seconds and then kills them
DEATHS = 2  # of a trial's own process, after which it counts as failed
ENVIRONMENT = {
    "TUNE_GLOBAL_CHECKPOINT_S": "0",  # its state is written at every event: what is not written runs again
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": str(LONGEST_CLEAN_UP_S),
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Dimension:
    """What one number, or one choice, is drawn from; ``high`` is included, in whole numbers too."""

    kind: str  # uniform, loguniform, quniform, randint, choice
    low: float = 0.0
    high: float = 1.0
    step: float | None = None
    options: tuple[Any, ...] = ()

    def domain(self) -> Any:
        """In Ray Tune's words."""
        if self.kind == "choice":
            return tune.choice(list(self.options))
        if self.kind == "randint":
            return tune.randint(int(self.low), int(self.high) + 1)
        if self.kind == "quniform":
            return tune.quniform(self.low, self.high, self.step)
        return getattr(tune, self.kind)(self.low, self.high)

    def bounded(self, value: Any) -> Any:
        """``value``, or the nearest end; PBT multiplies without looking."""
        if self.kind == "choice":
            return value
        value = min(max(value, self.low), self.high)
        return round(value) if self.kind == "randint" else value


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    ``metric`` of reports with ``step``; ``mode`` min or max. ``search`` random, grid or optuna; ``scheduler`` none,
    asha, median or pbt. ``grace_period`` and ``most_steps`` in steps. ``concurrent`` trials at a time.
    """

    metric: str
    mode: str
    search: str
    scheduler: str
    trials: int
    concurrent: int
    grace_period: int
    reduction_factor: int
    most_steps: int
    seed: int


class SearchListener(Protocol):
    """Hears of trials by Tune's names for them, in the thread that the search runs in."""

    def started(self, trial: str, drawn: dict[str, Any]) -> None:
        """It runs, for the first time, again, or with other numbers."""

    def reported(self, trial: str, report: dict[str, Any]) -> None:
        """An evaluation, or its end (``done``)."""

    def paused(self, trials: set[str]) -> None:
        """These, and no others, wait for their turn: in population-based training with fewer places than trials."""

    def stopping(self) -> None:
        """The search ends early. Called in the thread of `run_search`."""

    def ended(self, trial: str, drawn: dict[str, Any], error: str | None) -> None:
        """It will not run again: done, stopped by the scheduler, or dead (``error``)."""


class _Telling(tune.Callback):
    """Hands on what happens. Tune pickles its callbacks; of this one nothing but the class comes back."""

    def __init__(self, listener: SearchListener | None = None, stop: threading.Event | None = None) -> None:
        self.listener, self.stop = listener, stop
        self.failure: Exception | None = None  # of the listener: Tune itself logs most of them and goes on
        self.paused: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"listener": None, "stop": None, "failure": None, "paused": set()}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.stop is not None and self.stop.is_set():
            raise SearchStopped("the search was told to stop")
        if self.failure is not None:
            raise self.failure

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        paused = {trial.trial_id for trial in trials if trial.status == "PAUSED"}
        if paused != self.paused:
            self.paused = paused
            self._tell("paused", paused)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell("started", trial.trial_id, dict(trial.config))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._tell("reported", trial.trial_id, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell("ended", trial.trial_id, dict(trial.config), None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = getattr(trial, "get_error", lambda: None)()
        lines = [line for line in str(error or "its process died").splitlines() if line.strip()]
        self._tell("ended", trial.trial_id, dict(trial.config), lines[-1].strip()[:300])

    def _tell(self, what: str, *arguments: Any) -> None:
        try:
            if self.listener is not None:
                getattr(self.listener, what)(*arguments)
        except Exception as error:
            self.failure = self.failure or error


class SearchStopped(Exception):
    """The search was left before its end."""


def run_search(
    dimensions: Mapping[str, Dimension],
    settings: SearchSettings,
    work: TrialWork,
    work_config: Mapping[str, Any],
    folder: Path,
    listener: SearchListener,
) -> None:
    """Run, or go on with, a search until all its trials have ended.

    ``work(drawn, config, channel)`` is a trial, called in a process of its own on this node, where ``drawn`` has a
    value for every dimension and ``config`` is ``work_config``. ``folder``: where Tune keeps its state; one that holds
    a search goes on with it. Ray is initialised, on this node. Raises what ends the search early, KeyboardInterrupt
    among it; trials are then left to the end of the session.
    """
    for name, value in ENVIRONMENT.items():
        os.environ[name] = value
    # A thread that is left behind when the session ends must not start a Ray of its own.
    ray._private.auto_init_hook.enable_auto_connect = False
    stop = threading.Event()
    tuner = _tuner(dimensions, settings, work, work_config, folder, _Telling(listener, stop))
    # The thread is not joined: a join that Ctrl-C interrupts calls it ended (until Python 3.13), and Ray would be shut
    # down under its feet.
    raised, has_ended = list[BaseException](), threading.Event()

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:
            raised.append(error)
        finally:
            has_ended.set()

    # In the main thread Tune would answer Ctrl-C by calling its trials done.
    thread = threading.Thread(target=fit, name="mmada-search", daemon=True)
    thread.start()
    try:
        while not has_ended.wait(1.0):
            remove_orphaned_groups()
            keep_whole(folder / EXPERIMENT, folder / COPIES)
    except BaseException:
        stop.set()
        listener.stopping()
        has_ended.wait(LONGEST_STOP_S)
        raise
    if raised:
        raise raised[0]


def _tuner(
    dimensions: Mapping[str, Dimension],
    settings: SearchSettings,
    work: TrialWork,
    work_config: Mapping[str, Any],
    folder: Path,
    callback: _Telling,
) -> tune.Tuner:
    trainable = _trainable(settings, work, dict(work_config))
    run_config = tune.RunConfig(
        name=EXPERIMENT,
        storage_path=str(folder),
        verbose=0,
        callbacks=[callback],
        failure_config=tune.FailureConfig(max_failures=DEATHS),
    )
    tune_config = tune.TuneConfig(
        metric=settings.metric,
        mode=settings.mode,
        search_alg=_searcher(dimensions, settings),
        scheduler=_scheduler(dimensions, settings),
        num_samples=1 if settings.search == "grid" else settings.trials,
        reuse_actors=False,
    )
    place = folder / EXPERIMENT
    if not put_back(place, folder / COPIES):
        shutil.rmtree(place, ignore_errors=True)  # killed before it had drawn anything
    if tune.Tuner.can_restore(str(place)):
        tuner = tune.Tuner.restore(str(place), trainable, resume_unfinished=True)
        # Restored is what was pickled: the listener and the limits of this session take its place.
        tuner._local_tuner._run_config = run_config
        return tuner
    return tune.Tuner(
        trainable, param_space=_param_space(dimensions, settings), tune_config=tune_config, run_config=run_config
    )


def _trainable(settings: SearchSettings, work: TrialWork, config: dict[str, Any]) -> Any:
    """The trial's class with its work bound, on this node, so that not more than allowed run at once.

    Trials hold no CPU of their own (their workers do); what they share is the node's own resource, of which there is 1.
    """
    here = f"node:{ray.util.get_node_ip_address()}"
    share = int(10_000 / settings.concurrent) / 10_000
    bound = type("TrialActor", (TrialActor,), {"work": staticmethod(work), "work_config": config})
    return tune.with_resources(bound, tune.PlacementGroupFactory([{"CPU": 0, here: share}]))


def _param_space(dimensions: Mapping[str, Dimension], settings: SearchSettings) -> dict[str, Any]:
    if settings.search == "grid":
        return {name: tune.grid_search(list(each.options)) for name, each in dimensions.items()}
    return {name: each.domain() for name, each in dimensions.items()}


def _searcher(dimensions: Mapping[str, Dimension], settings: SearchSettings) -> Any:
    from ray.tune.search.basic_variant import BasicVariantGenerator

    if settings.search != "optuna":
        return BasicVariantGenerator(random_state=settings.seed)
    import optuna
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The sampler looks at random until ten trials have ended, or a third of them where there are fewer.
    sampler = optuna.samplers.TPESampler(n_startup_trials=min(10, max(1, settings.trials // 3)), seed=settings.seed)
    # Without the limit it would be asked for all trials before one of them has taught it anything.
    return ConcurrencyLimiter(OptunaSearch(sampler=sampler), max_concurrent=settings.concurrent)


def _scheduler(dimensions: Mapping[str, Dimension], settings: SearchSettings) -> Any:
    from ray.tune import schedulers

    if settings.scheduler == "asha":
        return schedulers.ASHAScheduler(
            time_attr="step",
            max_t=settings.most_steps + 1,  # reaching it would stop a trial at its own last step
            grace_period=settings.grace_period,
            reduction_factor=settings.reduction_factor,
        )
    if settings.scheduler == "median":
        return schedulers.MedianStoppingRule(time_attr="step", grace_period=settings.grace_period)
    if settings.scheduler == "pbt":

        def within(drawn: dict[str, Any]) -> dict[str, Any]:
            return {name: dimensions[name].bounded(value) for name, value in drawn.items()}

        return schedulers.PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=settings.grace_period,
            hyperparam_mutations={
                name: list(each.options) if each.kind == "choice" else each.domain()
                for name, each in dimensions.items()
            },
            custom_explore_fn=within,
            log_config=False,
        )
    return schedulers.FIFOScheduler()
