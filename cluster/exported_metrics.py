"""What Prometheus sees of runs and sweeps while they run: gauges and counters of ``ray.util.metrics``.

Every node of a Ray cluster serves them, the names with ``ray_`` in front and those of counters with ``_total`` behind,
and the dashboard in ``infra/monitoring`` draws them. MLflow is where a run is kept; here one sees what a cluster does.

Ray serves a gauge only for a while after it was set, so that nothing is shown of what has ended. Values that stand
for longer than that are therefore set again by a thread, until the run or sweep ends.
"""

from __future__ import annotations

import collections
import math
import threading
from collections.abc import Mapping, Sequence

from ray.util.metrics import Counter, Gauge

# Ray's agents forget a gauge two of their intervals (10 s each) after it was set.
REPEAT_S = 5.0

# Gauges of a run, by the name of the step's metric that they show.
STEP_GAUGES = {
    "step": ("mmada_step", "Newest optimizer step, or iteration of reinforcement learning"),
    "loss": ("mmada_loss", "Loss of the newest step"),
    "gradient_norm": ("mmada_gradient_norm", "Norm of the whole gradient before clipping"),
    "learning_rate": ("mmada_learning_rate", "Learning rate"),
    "tokens_per_second": ("mmada_tokens_per_second", "Tokens learned from per second of the newest step"),
    "step_seconds": ("mmada_step_seconds", "Seconds of the newest step"),
    "reward": ("mmada_reward", "Mean reward of the newest batch"),
    "reward_std": ("mmada_reward_std", "Standard deviation of the rewards of the newest batch"),
    "kl": ("mmada_kl", "Divergence from the reference policy, nats per completion"),
    "entropy": ("mmada_entropy", "Entropy of the policy, nats per token"),
    "clip_fraction": ("mmada_clip_fraction", "Share of tokens whose ratio was clipped"),
    "logprob_gap": ("mmada_logprob_gap", "Largest difference of log-probabilities between learners and actors"),
    "completion_length": ("mmada_completion_length", "Mean number of tokens of a completion"),
    "staleness_max": ("mmada_staleness_max", "Updates that the oldest trajectory of a batch is behind"),
    "sampling_tokens_per_second": ("mmada_sampling_tokens_per_second", "Tokens per second of all rollout actors"),
    "waiting_seconds": ("mmada_waiting_seconds", "Seconds that learners waited for the newest batch"),
    "publishing_seconds": ("mmada_publishing_seconds", "Seconds until the newest weights were published"),
}
# Gauges of a run, by the name of the step's metric that is added up.
STEP_TOTALS = {
    "rewards_failed": ("mmada_rewards_failed", "Rewards that could not be had, since the driver's start"),
    "trajectories_dropped": ("mmada_trajectories_dropped", "Trajectories no learner got, since the driver's start"),
}
RUN_TAGS = ("run", "verb")


class RunMetrics:
    """The exported metrics of one run: a context manager, at whose end they end.

    What happens rarely is a gauge that begins at 0 and not a counter: Ray serves a counter from its first event on, of
    which Prometheus then sees no increase.

    Args:
        run: the run's name.
        verb: what is done, ``train`` or ``ppo``.
        kinds: of processes whose failures ``failed`` counts.
    """

    def __init__(self, run: str, verb: str, kinds: Sequence[str]) -> None:
        self._tags = {"run": run, "verb": verb}
        self._gauges = {key: Gauge(name, words, RUN_TAGS) for key, (name, words) in STEP_GAUGES.items()}
        self._totals = {key: Gauge(name, words, RUN_TAGS) for key, (name, words) in STEP_TOTALS.items()}
        self._tokens = Counter("mmada_tokens", "Tokens learned from, those of repeated steps too", RUN_TAGS)
        self._held_out = Gauge("mmada_held_out", "Newest measurement on what was held out", (*RUN_TAGS, "metric"))
        self._failures = Gauge("mmada_failures", "Failures of processes since the driver's start", (*RUN_TAGS, "kind"))
        self._sums: dict[str, float] = collections.defaultdict(float)
        self._repeater = _Repeater()
        for kind in kinds:
            self._repeater.set(self._failures, 0, {**self._tags, "kind": kind})

    def __enter__(self) -> RunMetrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self._repeater.close()

    def step(self, row: Mapping[str, float]) -> None:
        """A step's metrics, of which those are exported that stand in the tables of this module."""
        for key, gauge in self._gauges.items():
            if math.isfinite(value := row.get(key, math.nan)):
                self._repeater.set(gauge, value, self._tags)
        for key, total in self._totals.items():
            if key in row:
                self._sums[key] += row[key]
                self._repeater.set(total, self._sums[key], self._tags)
        self._repeater.add(self._tokens, row.get("tokens", 0), self._tags)

    def held_out(self, metric: str, value: float) -> None:
        """A measurement on what was held out, under its own name."""
        if math.isfinite(value):
            self._repeater.set(self._held_out, value, {**self._tags, "metric": metric})

    def failed(self, kind: str) -> None:
        """A process of this kind has failed, be it for good or until it is replaced."""
        self._sums[kind] += 1
        self._repeater.set(self._failures, self._sums[kind], {**self._tags, "kind": kind})


class SweepMetrics:
    """The exported metrics of one sweep: a context manager, at whose end they end.

    Args:
        sweep_name: the sweep's name.
        metric_name: what is searched for the best value of, as the recipe names it.
    """

    def __init__(self, sweep_name: str, metric_name: str) -> None:
        self._sweep, self._metric = sweep_name, metric_name
        self._trials = Gauge("mmada_sweep_trials", "Trials of a sweep by what has become of them", ("sweep", "state"))
        self._best = Gauge("mmada_sweep_best", "Best value that a trial has reached", ("sweep", "metric"))
        self._repeater = _Repeater()

    def __enter__(self) -> SweepMetrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self._repeater.close()

    def trials(self, *, pending: int = 0, running: int = 0, done: int = 0, stopped: int = 0, failed: int = 0) -> None:
        """How many trials wait, run, have done all their steps, were stopped early, have failed."""
        counts = {"pending": pending, "running": running, "done": done, "stopped": stopped, "failed": failed}
        for state, count in counts.items():
            self._repeater.set(self._trials, float(count), {"sweep": self._sweep, "state": state})

    def best(self, value: float) -> None:
        """The best value so far."""
        if math.isfinite(value):
            self._repeater.set(self._best, value, {"sweep": self._sweep, "metric": self._metric})


class _Repeater(threading.Thread):
    """Keeps what gauges were set to last and sets them to it again. Once it is closed, nothing reaches Ray any more:
    a thread that is still at work may not touch what ``ray.shutdown`` takes away."""

    def __init__(self) -> None:
        super().__init__(name="mmada-exported-metrics", daemon=True)
        self._values: dict[tuple[str, ...], tuple[Gauge, float, dict[str, str]]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.start()

    def set(self, gauge: Gauge, value: float, tags: dict[str, str]) -> None:
        with self._lock:
            if not self._closed.is_set():
                self._values[gauge.info["name"], *tags.values()] = (gauge, float(value), tags)
                gauge.set(float(value), tags)

    def add(self, counter: Counter, value: float, tags: dict[str, str]) -> None:
        with self._lock:
            if value > 0 and not self._closed.is_set():
                counter.inc(float(value), tags)

    def run(self) -> None:
        while not self._closed.wait(REPEAT_S):
            with self._lock:
                for gauge, value, tags in [] if self._closed.is_set() else self._values.values():
                    gauge.set(value, tags)

    def close(self) -> None:
        with self._lock:
            self._closed.set()
        self.join(timeout=REPEAT_S)
