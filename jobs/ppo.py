"""``mmada ppo``: a policy improved by reinforcement learning, with rollouts and rewards as Ray actors.

The driver starts rollout actors, reward actors and an exchange; the learners are Ray Train workers. Who does what
stands in ``jobs.rl.rollout_loop``, ``jobs.rl.learner`` and ``cluster.exchange``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.actor_pool import ActorPool, ActorResources, PoolEvent
from cluster.errors import ClusterError
from cluster.exchange import Exchange
from jobs import worker_start
from jobs.driver import Driver, start
from jobs.learned_problems import check_unseen
from jobs.recipe import Recipe
from jobs.rl.evaluation_loop import EvaluationLoop
from jobs.rl.ledger import DRIVER_FILE, LedgerFile, entries, ledger_totals
from jobs.rl.messages import Trajectory
from jobs.rl.policy_source import REFERENCE, write_reference
from jobs.rl.reward_worker import RewardWorker
from jobs.rl.rollout_loop import RolloutLoop
from jobs.rl.rollout_worker import RolloutWorker
from jobs.run_record import RunRecord
from jobs.shrinking import ppo_for
from jobs.task_source import load_recipe_tasks
from jobs.worker_recipe import recipe_for_workers
from mmada.data import load_tokenizer
from mmada.data.tasks import TaskSet
from mmada.plots.reward_curve import reward_curve

_START_TIMEOUT_S = 180.0  # of an actor: most of it is the import of torch
_TEXTS = 8  # samples in a table


class PPORecord(RunRecord):
    """Keeps the reward, and what guards it."""

    def add(self, row: dict[str, Any]) -> dict[str, float]:
        """As every record does."""
        metrics = super().add(row)
        kept = ("loss", "reward", "kl", "reference_kl", "entropy", "logprob_gap", "explained_variance")
        self.metrics |= {name: row[name] for name in kept if name in row}
        return metrics


def run(recipe: Recipe) -> int:
    """Improve the policy of a recipe that ``jobs.recipe_checks_ppo`` has passed; the exit code.

    Raises RecipeError, DataError or ClusterError before anything has started.
    """
    return start(recipe, prepare(recipe))


def prepare(recipe: Recipe) -> Callable[[Path], PPORun]:
    """Read what a recipe learns from; what makes its driver for a run's folder. Raises as ``run``."""
    tasks = load_recipe_tasks(recipe)
    if not recipe.run.resume:
        check_unseen(tasks, recipe.ppo.start_from if recipe.ppo is not None else None, "ppo.start_from")
    return lambda run_dir: PPORun(recipe, run_dir, tasks)


class PPORun(Driver):
    """The driver's side of reinforcement learning."""

    verb = "ppo"
    kinds = ("worker", "rollout", "reward")
    tracked_metric = "reward"
    steps_key = "ppo.iterations"

    def __init__(self, recipe: Recipe, run_dir: Path, tasks: TaskSet) -> None:
        assert recipe.ppo is not None and recipe.tasks is not None
        self.settings, self.tasks = recipe.ppo, tasks
        self.extra_cpus = recipe.ppo.rollout_workers * recipe.ppo.rollout_cpus
        self.extra_gpus = recipe.ppo.rollout_workers * recipe.ppo.rollout_gpus
        self.extra_actors = recipe.ppo.rollout_workers
        self.replaced = 0
        super().__init__(recipe, run_dir, tasks.fingerprint, f"tasks.family={recipe.tasks.family}")
        self.accuracy: dict[int, float] = {int(k): v for k, v in self.state.get("accuracy", {}).items()}

    def make_record(self) -> RunRecord:
        """One that keeps the reward."""
        return PPORecord()

    @property
    def steps(self) -> int:
        """``ppo.iterations``."""
        return self.settings.iterations

    def announce(self) -> None:
        """What the problems and the policy are, and who works on them."""
        own, cluster = self.settings, self.recipe.cluster
        families = ", ".join(self.tasks.source.families)
        self.line.say(f"tasks    {families}: {len(self.tasks.train):,} problems, {len(self.tasks.held_out):,} held out")
        self.line.say(f"policy   {own.start_from or 'fresh weights'}, {own.algorithm}")
        counts = (
            (cluster.workers, "learner"),
            (own.rollout_workers, "rollout actor"),
            (own.reward_workers, "reward actor"),
        )
        self.line.say("work     " + ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counts))
        if not (self.run_dir / REFERENCE).exists():
            write_reference(self.recipe, self.run_dir / REFERENCE)

    def work(self) -> Callable[[dict[str, Any]], None]:
        """The learner."""
        return worker_start.learn

    def worker_config(self) -> dict[str, Any]:
        """Where batches come from."""
        return {"exchange": self.exchange}

    def resized(self, recipe: Recipe, workers: int) -> Recipe:
        """The same minibatches, shared by fewer learners."""
        return ppo_for(recipe, workers)

    @contextmanager
    def beside_the_workers(self) -> Iterator[None]:
        """Rollout and reward actors, and the thread that drives them."""
        own, recipe = self.settings, recipe_for_workers(self.recipe)
        tokenizer = load_tokenizer(self.recipe.data.tokenizer)
        threads = own.rollout_threads or max(1, (os.cpu_count() or 1) // own.rollout_workers)
        assert self.recipe.reward is not None
        with contextlib.ExitStack() as stack:
            self.line.wait("starting rollout and reward actors …")
            self.exchange = Exchange.start()
            stack.callback(self.exchange.close)
            rollouts = stack.enter_context(
                ActorPool(
                    RolloutWorker,
                    {"recipe": recipe, "run_dir": str(self.run_dir), "threads": threads},
                    own.rollout_workers,
                    resources=ActorResources(num_cpus=own.rollout_cpus, num_gpus=own.rollout_gpus),
                    task_timeout_s=own.rollout_timeout,
                    start_timeout_s=_START_TIMEOUT_S,
                    max_replacements=own.max_replacements,
                    on_event=lambda event: self._tell("rollout", event),
                )
            )
            rewards = stack.enter_context(
                ActorPool(
                    RewardWorker,
                    {"recipe": recipe, "folder": os.getcwd()},
                    own.reward_workers,
                    resources=ActorResources(num_cpus=0),
                    task_timeout_s=self.recipe.reward.timeout,
                    start_timeout_s=_START_TIMEOUT_S,
                    max_replacements=own.max_replacements,
                    retries=self.recipe.reward.retries,
                    on_event=lambda event: self._tell("reward", event),
                )
            )
            ledger = LedgerFile(self.run_dir / DRIVER_FILE)
            stack.callback(ledger.close)
            evaluation = EvaluationLoop(own, len(self.tasks.held_out), self.accuracy, self._evaluated)
            loop = RolloutLoop(
                self.recipe,
                self.tasks,
                tokenizer,
                self.exchange,
                rollouts,
                rewards,
                ledger,
                evaluation,
                self._tabulate,
                self.line.say,
            )
            thread = threading.Thread(target=loop.run, name="mmada-rollouts", daemon=True)
            thread.start()
            try:
                yield
            except BaseException:
                if loop.failure is not None:  # what ended the run, of which the workers' end is a consequence
                    raise ClusterError(loop.failure) from None
                raise
            finally:
                loop.is_over = True
                thread.join(timeout=60)
            if loop.failure is not None:
                raise ClusterError(loop.failure)

    def _tell(self, kind: str, event: PoolEvent) -> None:
        """An actor was lost or replaced."""
        if event.kind in ("died", "hung"):
            self.exported.failed(kind)
            self.line.say(
                f"{kind} actor {event.actor} {event.kind} ({event.reason}); {event.lost_seconds:.1f} s of its work lost"
            )
        elif event.kind == "replaced":
            self.replaced += 1
            self.line.say(f"{kind} actor {event.actor} replaced after {event.seconds:.1f} s")

    def _evaluated(self, version: int, num_problems: int) -> None:
        accuracy = self.accuracy[version]
        self._remember(accuracy=self.accuracy)
        self.tracker.log(version, {"held_out_accuracy": accuracy})
        self.exported.held_out("held_out_accuracy", accuracy)
        if self.listener is not None:
            self.listener({"step": version, "held_out_accuracy": accuracy})
        self.line.say(f"held out {accuracy:.1%} of {num_problems} problems solved after iteration {version}")

    def _tabulate(self, iteration: int, scored: list[tuple[Trajectory, float]]) -> None:
        """Some texts of a batch, for MLflow."""
        every = self.settings.table_every
        if not every or (iteration % every and iteration + 1 != self.settings.iterations):
            return
        rows = [
            {
                "iteration": iteration + 1,
                "version": trajectory.version,
                "prompt": load_tokenizer(self.recipe.data.tokenizer).decode(
                    trajectory.prompt, skip_special_tokens=True
                ),
                "completion": trajectory.text,
                "reward": score,
                "tokens": len(trajectory.completion.ids),
                "finish": trajectory.completion.finish,
            }
            for trajectory, score in scored[:_TEXTS]
        ]
        self.tracker.table("samples", rows)

    def words(self, row: dict[str, Any]) -> list[str]:
        """Reward, divergence, speed."""
        parts = [f"reward {row['reward']:.3f}"]
        if measured := [*self.accuracy.items()]:  # the other thread adds to them
            parts.append(f"held out {max(measured)[1]:.1%}")
        kl = row.get("kl", row.get("reference_kl"))  # neither without a reference
        parts += [] if kl is None else [f"kl {kl:.3f}"]
        return [*parts, f"{row['tokens_per_second']:,.0f} tokens/s"]

    def figures(self) -> dict[str, Any]:
        """The reward's curve."""
        curves = self.record.curves
        reward, spread = ([*curves.get(name, {}).items()] for name in ("reward", "reward_std"))
        return {"reward_curve": reward_curve(reward, spread, sorted(self.accuracy.items()), self.recipe.run.name)}

    def closing(self) -> None:
        """How much was gained."""
        found = self.summary(is_done=True)
        accuracies = (found["accuracy_before"], found["accuracy_after"])
        before, after = ("not measured" if each is None else f"{each:.1%}" for each in accuracies)
        rewards = (
            ""
            if found["reward_first"] is None
            else f"; reward {found['reward_first']:.3f} to {found['reward_last']:.3f}"
        )
        self.line.say(f"done     held-out accuracy {before} before, {after} after{rewards}")

    def what_next(self, mmada: str, checkpoint: str) -> list[str]:
        """Scores on the held-out problems, and an export."""
        return [f"evaluate  {mmada} evaluate {checkpoint}", *super().what_next(mmada, checkpoint)]

    def summary(self, is_done: bool) -> dict[str, Any]:
        """What was gained, at what speed, and what failed on the way."""
        curves, record = self.record.curves, self.record
        reward = [value for _, value in sorted(curves.get("reward", {}).items())]
        gaps = curves.get("logprob_gap", {}).values()
        return {
            "reward_first": reward[0] if reward else None,
            "reward_last": reward[-1] if reward else None,
            "accuracy_before": self.accuracy.get(0),
            "accuracy_after": self.accuracy.get(record.steps),
            "completion_tokens_per_second": record.metrics.get("tokens_per_second"),
            "logprob_gap": max(gaps, default=None),
            "rewards_failed": sum(curves.get("rewards_failed", {}).values()),
            "actors_replaced": self.replaced,
            "ledger": ledger_totals(entries(self.run_dir)),
        }
