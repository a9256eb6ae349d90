"""The driver's half of reinforcement learning: draw prompts, have them sampled and scored, offer batches to the
learners, and hand the learners' weights to the rollout actors.

A thread of the driver's runs ``RolloutLoop.run`` beside the learners. It alone talks to the actors; what it decides
about versions and iterations follows from the learners' news alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from cluster.actor_pool import ActorPool, Done
from cluster.errors import ClusterError
from cluster.exchange import Begun, Exchange, Published, Stopped
from jobs.recipe import Recipe
from jobs.rl.evaluation_loop import EvaluationLoop
from jobs.rl.experience import collect
from jobs.rl.ledger import LedgerFile
from jobs.rl.logprob_gap import gap_message, max_logprob_gap
from jobs.rl.messages import Request, Sampled, Trajectory
from mmada.data import global_batch_indices
from mmada.data.task_rows import prompt_ids
from mmada.data.tasks import TaskSet
from mmada.nn.router import mix64
from mmada.training.rewards import RewardResult

_TICK_S = 0.5
_LOAD_TIMEOUT_S = 180.0
_RELOADS = 3  # attempts at handing over a version whose weights some actor could not fetch


class RunStopped(RuntimeError):
    """The run cannot go on; the message is one line naming what happened, the limit and a remedy."""


@dataclass
class Making:
    """An iteration's batch while it is made."""

    iteration: int
    oldest_version: int
    prompts: np.ndarray
    started: float = field(default_factory=time.monotonic)
    waiting: set[tuple[int, int]] = field(default_factory=set)  # trajectories that are not settled
    scored: list[tuple[Trajectory, float]] = field(default_factory=list)
    components: list[dict[str, float]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # "all", and "reward" of them
    last_reason: str = ""
    sampling_seconds: float = 0.0
    reference_seconds: float = 0.0
    reward_seconds: float = 0.0
    sampled_after: float = 0.0


class RolloutLoop:
    """Runs until the learners are done, or something stops it: ``failure`` then says why."""

    def __init__(
        self,
        recipe: Recipe,
        tasks: TaskSet,
        tokenizer: Any,
        exchange: Exchange,
        rollouts: ActorPool,
        rewards: ActorPool,
        ledger: LedgerFile,
        evaluation: EvaluationLoop,
        on_batch: Callable[[int, list[tuple[Trajectory, float]]], None],
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        assert recipe.ppo is not None
        self.recipe, self.settings, self.tasks = recipe, recipe.ppo, tasks
        self.exchange, self.rollouts, self.rewards = exchange, rollouts, rewards
        self.ledger, self.evaluation, self.on_batch, self.say = ledger, evaluation, on_batch, say
        self.padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.prompt_tokens = [prompt_ids(tokenizer, item.prompt) for item in tasks.train]
        self.failure: str | None = None
        self.generation, self.start, self.next, self.version = 0, 0, 0, -1
        self.making: dict[int, Making] = {}
        self.payload: Any = None
        self.reloads = 0
        self.gaps: dict[int, tuple[int, float]] = {}
        self.gap_limit = max_logprob_gap(recipe)
        self.calls = 0
        self.held: dict[int, list[Any]] = {}  # by call: requests, or trajectories to score
        self.heard_at: float | None = None  # when learners last published
        self.released: int | None = None  # the generation of learners that have what they need
        self.is_over = False  # set by the driver when the learners have ended

    def run(self) -> None:
        """Until the driver says that the learners have ended. ``failure`` says what went wrong; what nobody foresaw is
        also raised, for the log."""
        try:
            self._run()
        except Stopped as stopped:  # by the learners
            self.failure = stopped.reason
        except (RunStopped, ClusterError) as stopped:
            self._stop(str(stopped))
        except Exception as error:
            self._stop(f"{type(error).__name__}: {error}")
            raise

    def _stop(self, reason: str) -> None:
        self.failure = reason
        self.exchange.stop(reason)

    def _run(self) -> None:
        seen = 0
        asked = self.exchange.ask_news(seen, _TICK_S)
        while not self.is_over:
            ready, _ = ray.wait(
                [asked, *self.rollouts.refs(), *self.rewards.refs()], timeout=_TICK_S, fetch_local=False
            )
            if asked in ready:
                for news in self.exchange.read_news(asked, _TICK_S):
                    seen = news.number
                    self._begin(news) if isinstance(news, Begun) else self._published(news)
                asked = self.exchange.ask_news(seen, _TICK_S)
            for done in self.rollouts.wait(0):
                self._rolled_out(done)
            for done in self.rewards.wait(0):
                self._rewarded(done)
            self._check_gaps()
            self._offer_complete()
            self._dispatch()
        self.exchange.news(seen)  # raises Stopped where the learners ended with a reason that was not read yet

    # News from the learners.

    def _begin(self, begun: Begun) -> None:
        """Learners start, or start again: what was under way counts for nothing."""
        self.rollouts.cancel_all()
        self.rewards.cancel_all()
        self.making.clear()
        self.held.clear()
        self.evaluation.forget(begun.start)
        self.generation, self.start, self.next, self.version = begun.generation, begun.start, begun.start, -1
        self.ledger.write("begin", generation=begun.generation, start=begun.start)

    def _published(self, published: Published) -> None:
        if published.generation != self.generation:
            return
        now = time.monotonic()
        if self.version < 0 and self.heard_at is not None:  # others published before these
            self.say(f"learners back after {now - self.heard_at:.1f} s")
        self.heard_at = now
        self.version, self.payload, self.reloads = published.version, published.payload, 0
        self._hand_over()
        self.evaluation.begin(self.version, self.rollouts)

    def _hand_over(self) -> None:
        refs, probe = self.payload
        own = (self.generation, self.version, refs, probe)
        self.rollouts.set_state(self.version, "load", *own, timeout_s=_LOAD_TIMEOUT_S)

    def _check_gaps(self) -> None:
        """What actors found when they took up a version."""
        for actor, (version, loaded) in self.rollouts.states().items():
            if loaded.generation != self.generation or version > self.version:
                continue  # of learners before these
            if loaded.problem is not None:
                raise RunStopped(f"rollout actor {actor} cannot take up version {version}: {loaded.problem}")
            if (gap := loaded.gap) is None or self.gaps.get(actor) == (version, gap):
                continue
            self.gaps[actor] = (version, gap)
            if not gap <= self.gap_limit:
                raise RunStopped(gap_message(f"rollout actor {actor}'s", version, gap, self.gap_limit))

    # Sampling.

    def _dispatch(self) -> None:
        """Begin the iterations that the published version may sample."""
        iterations, staleness = self.settings.iterations, self.settings.max_staleness
        while self.version >= 0 and self.next < iterations and self.next - self.version <= staleness:
            self._draw(self.next)
            self.next += 1
        if self.version >= iterations and not self.evaluation.is_busy and self.released != self.generation:
            # The learners may go. Should they die on the way, before their last checkpoint, others begin again.
            self.exchange.offer(self.generation, iterations, ray.put(None))
            self.released = self.generation

    def _draw(self, iteration: int) -> None:
        settings = self.settings
        num_prompts, samples = settings.prompts_per_iteration, settings.samples_per_prompt
        prompts = global_batch_indices(self.recipe.run.seed, iteration, num_prompts, len(self.tasks.train))
        making = self.making[iteration] = Making(iteration, max(self.version, 0), prompts)
        making.waiting = {(slot, sample) for slot in range(num_prompts) for sample in range(samples)}
        self.ledger.write(
            "drawn", iteration=iteration, generation=self.generation, prompts=prompts.tolist(), samples=samples
        )
        seeds = sample_seeds(self.recipe.run.seed, iteration, num_prompts, samples)
        requests = [
            Request(iteration, slot, self.prompt_tokens[index], seeds[slot].tolist())
            for slot, index in enumerate(prompts)
        ]
        share = -(-num_prompts // settings.rollout_workers)
        for first in range(0, num_prompts, share):
            self._submit_sampling(requests[first : first + share], making.oldest_version)

    def _submit_sampling(self, requests: list[Request], oldest_version: int) -> None:
        self.rollouts.submit(("sample", self._hold(requests)), "sample", requests, oldest_version)

    def _hold(self, items: list[Any]) -> int:
        """The number of a new call, under which what it is about is kept."""
        self.calls += 1
        self.held[self.calls] = items
        return self.calls

    def _rolled_out(self, done: Done) -> None:
        kind, number = done.key
        if kind == "evaluate":
            if problem := self.evaluation.take(done, self.rollouts):
                raise RunStopped(f"{problem}; see ray-logs beside the run's logs")
            return
        requests: list[Request] = self.held.pop(number)
        if done.failure is not None:
            if done.failure.kind == "raised":
                raise RunStopped(f"sampling failed: {done.failure.message}; see ray-logs beside the run's logs")
            for request in requests:
                for sample in range(len(request.seeds)):
                    self._drop(request.iteration, request.slot, sample, f"rollout {done.failure.message}")
            return
        sampled: Sampled = done.value
        if sampled.trajectories is None:
            self._again(requests)
            return
        making = self.making[requests[0].iteration]
        making.sampling_seconds += sampled.sampling_seconds
        making.reference_seconds += sampled.reference_seconds
        making.sampled_after = time.monotonic() - making.started
        for request in requests:
            versions = [each.version for each in sampled.trajectories if each.slot == request.slot]
            self.ledger.write(
                "sampled",
                iteration=request.iteration,
                generation=self.generation,
                slot=request.slot,
                versions=versions,
            )
        self._send_to_rewards(sampled.trajectories)

    def _again(self, requests: list[Request]) -> None:
        """An actor could not fetch the weights: all take them up once more."""
        self.reloads += 1
        if self.reloads > _RELOADS:
            raise RunStopped(
                f"weights of version {self.version} could not be fetched by a rollout actor in {_RELOADS} attempts; "
                "see the cluster's network and object store"
            )
        self._hand_over()
        self._submit_sampling(requests, self.making[requests[0].iteration].oldest_version)

    # Rewards.

    def _send_to_rewards(self, trajectories: list[Trajectory]) -> None:
        assert self.recipe.reward is not None
        size = self.recipe.reward.batch
        for first in range(0, len(trajectories), size):
            self._submit_rewards(trajectories[first : first + size])

    def _submit_rewards(self, trajectories: list[Trajectory]) -> None:
        asked = [
            (int(self.making[each.iteration].prompts[each.slot]), each.text, each.completion.finish != "length")
            for each in trajectories
        ]
        self.rewards.submit(self._hold(trajectories), "score", asked)

    def _rewarded(self, done: Done) -> None:
        trajectories: list[Trajectory] = self.held.pop(done.key)
        if done.failure is not None:
            if len(trajectories) > 1:  # one of them may be to blame: each by itself
                for trajectory in trajectories:
                    self._submit_rewards([trajectory])
            else:
                self._fail_reward(trajectories[0], f"reward actor {done.failure.kind}: {done.failure.message}")
            return
        results: list[RewardResult] = done.value
        for trajectory, result in zip(trajectories, results, strict=True):
            if result.value is None:
                self._fail_reward(trajectory, str(result.error))
                continue
            making = self.making[trajectory.iteration]
            making.reward_seconds += result.seconds
            making.components.append(result.components)
            making.scored.append((trajectory, result.value))
            making.waiting.discard((trajectory.slot, trajectory.sample))

    def _fail_reward(self, trajectory: Trajectory, reason: str) -> None:
        self.making[trajectory.iteration].dropped["reward"] += 1
        self._drop(trajectory.iteration, trajectory.slot, trajectory.sample, reason)

    def _drop(self, iteration: int, slot: int, sample: int, reason: str) -> None:
        making = self.making[iteration]
        making.dropped["all"] += 1
        making.waiting.discard((slot, sample))
        self.ledger.write(
            "dropped", iteration=iteration, generation=self.generation, slot=slot, sample=sample, reason=reason
        )
        making.last_reason = reason

    # Batches for the learners.

    def _offer_complete(self) -> None:
        for iteration in [each for each, making in self.making.items() if not making.waiting]:
            making = self.making.pop(iteration)
            self._check_failures(making)
            batch = collect(iteration, self.generation, making.scored, self.padding, self._metrics(making))
            self.exchange.offer(self.generation, iteration, ray.put(batch))
            self.on_batch(iteration, making.scored)

    def _check_failures(self, making: Making) -> None:
        wanted = len(making.prompts) * self.settings.samples_per_prompt
        failed, limit = making.dropped["reward"], self.settings.max_reward_failures
        if making.dropped["all"] > limit * wanted or not making.scored:
            raise RunStopped(
                f"{making.dropped['all']} of the {wanted} trajectories of iteration {making.iteration + 1} failed, "
                f"{failed} in their reward (the last: {making.last_reason}), more than "
                f"ppo.max_reward_failures={limit:g} allows; mend the reward, or allow more"
            )

    def _metrics(self, making: Making) -> dict[str, float]:
        scores = np.array([score for _, score in making.scored])
        lengths = np.array([len(trajectory.completion.ids) for trajectory, _ in making.scored])
        ended = np.array([trajectory.completion.finish != "length" for trajectory, _ in making.scored])
        staleness = np.array([making.iteration - trajectory.version for trajectory, _ in making.scored])
        names = {name for components in making.components for name in components}
        parts = {name: [each[name] for each in making.components if name in each] for name in names}
        gaps = [gap for version, gap in self.gaps.values()]
        metrics = {
            "reward": float(scores.mean()),
            "reward_std": float(scores.std()),
            "completion_length": float(lengths.mean()),
            "ended": float(ended.mean()),
            "staleness": float(staleness.mean()),
            "staleness_max": float(staleness.max()),
            "rewards_failed": float(making.dropped["reward"]),
            "trajectories_dropped": float(making.dropped["all"]),
            "trajectories": float(len(scores)),
            "sampling_seconds": making.sampling_seconds / self.settings.rollout_workers,
            "reference_seconds": making.reference_seconds / self.settings.rollout_workers,
            "reward_seconds": making.reward_seconds / self.settings.reward_workers,
            "batch_seconds": time.monotonic() - making.started,
            "sampling_tokens_per_second": float(lengths.sum()) / max(making.sampled_after, 1e-9),
            **{f"reward_part.{name}": float(np.mean(values)) for name, values in parts.items()},
        }
        if gaps:
            metrics["probe_logprob_gap"] = max(gaps)
        return metrics


def sample_seeds(seed: int, iteration: int, num_prompts: int, samples: int) -> np.ndarray:
    """A seed for every sample of an iteration, (num_prompts, samples) int64: a function of the arguments alone."""
    import torch

    first = iteration * num_prompts * samples
    numbers = torch.arange(first, first + num_prompts * samples) + (seed + 1) * 0x2545F4914F6CDD1D % 2**63
    return (mix64(numbers) & (2**62 - 1)).view(num_prompts, samples).numpy()
