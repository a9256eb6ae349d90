"""What one learner does: publish weights, take a batch of experience, improve the policy on it, and again.

Learners are Ray Train workers with a DeepSpeed engine each, as in ``mmada train``. A step is an iteration: one batch,
and however many optimizer steps are taken on it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from cluster.checkpoints import CheckpointStore
from cluster.engine import Engine
from cluster.exchange import Exchange, Stopped
from cluster.weights import pack, publish
from jobs.checkpointing import Resume, find_resume, restore, save
from jobs.engine_settings import policy_settings
from jobs.progress import Progress
from jobs.recipe import Recipe
from jobs.rl import ledger
from jobs.rl.experience import Experience
from jobs.rl.logprob_gap import gap_message, max_logprob_gap
from jobs.rl.policy_source import REFERENCE
from jobs.rl.policy_update import PolicyUpdate
from jobs.worker import write_output_to
from mmada.actor_critic import POLICY, ActorCritic
from mmada.data import load_tokenizer
from mmada.model import MMaDAForCausalLM
from mmada.training.algorithms import ALGORITHMS


def learner_worker(config: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker; ``config`` holds ``recipe``, ``run_dir`` and the ``exchange``."""
    context = ray.train.get_context()
    run_dir = Path(config["run_dir"])
    write_output_to(run_dir / "logs" / f"worker-{context.get_world_rank()}.log")
    recipe = Recipe.model_validate(config["recipe"])
    share = (os.cpu_count() or 1) // context.get_local_world_size()
    torch.set_num_threads(recipe.cluster.threads_per_worker or max(1, share))
    Learner(recipe, run_dir, ray.train.torch.get_device(), ray.train.report, config["exchange"]).run()


class Learner:
    """One rank. Every method is called by all ranks together; torch.distributed is initialised."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        device: torch.device,
        report: Callable[[dict[str, Any]], None],
        exchange: Exchange,
    ) -> None:
        assert recipe.ppo is not None
        self.recipe, self.settings, self.run_dir = recipe, recipe.ppo, run_dir
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device, self.exchange = device, exchange
        self.tokenizer = load_tokenizer(recipe.data.tokenizer)
        self.model = build_actor_critic(recipe, run_dir / REFERENCE).to(device)
        settings = policy_settings(recipe, self.model)
        self.store = CheckpointStore(run_dir / "checkpoints", keep=recipe.train.keep_checkpoints)
        self.progress = Progress(self.rank, self.world, run_dir, device, report)
        self.trained = ledger.LedgerFile(run_dir / ledger.LEARNER_FILE) if self.rank == 0 else None

        found: list[Any] = [None]
        if self.rank == 0:
            self.store.discard_partials()
            found[0] = find_resume(self.store, settings, self.world, run_dir)
        dist.broadcast_object_list(found, src=0)
        resume: Resume | None = found[0]
        self.engine = Engine(self.model, settings)
        self.update = PolicyUpdate(recipe, self.engine, device)
        torch.manual_seed(recipe.run.seed + 1 + self.rank)
        self.start = self._resume(resume) if resume is not None else 0

    def _resume(self, resume: Resume) -> int:
        self.progress.note(resume.notes)
        if resume.folder is None:
            return 0
        start = restore(self.engine, resume, self.rank, POLICY)
        again = sum(entry.iteration >= start for entry in ledger.entries(self.run_dir)) if self.rank == 0 else 0
        if again:
            self.progress.note([f"iterations learned from since then, to be done again: {again}"])
        self.update.kl.load_state_dict(resume.metadata["kl"])
        self.update.optimizer_steps = resume.metadata["optimizer_steps"]
        if self.trained is not None:
            ledger.restore(self.run_dir, resume.folder / ledger.SAVED_FILE, start, self.trained)
        return start

    def run(self) -> None:
        """Learn from where the run stands to ``ppo.iterations``. Returns early when the run is stopped."""
        try:
            self._run()
        except Stopped:
            return  # the driver knows why, and says it

    def _run(self) -> None:
        iterations, every = self.settings.iterations, self.settings.checkpoint_every
        self.progress.begin(self.start, iterations)
        self._begin()
        self._publish(self.start, None)
        for iteration in range(self.start, iterations):
            started = time.perf_counter()
            batch = self._take(iteration)
            taken = time.perf_counter()
            metrics = self.update.learn(iteration, batch)
            learned = time.perf_counter()
            self._check(iteration, metrics)
            if self.trained is not None:
                self.trained.write(
                    "trained", iteration=iteration, generation=batch.generation, trajectories=batch.names
                )
            done = iteration + 1
            self._publish(done, batch)
            ended = time.perf_counter()
            metrics |= {
                "waiting_seconds": taken - started,
                "learning_seconds": learned - taken,
                "publishing_seconds": ended - learned,
                "step_seconds": ended - started,
                "learning_tokens_per_second": batch.num_completion_tokens / (learned - taken),
            }
            self.progress.add(done, metrics)
            saves = done == iterations or (every > 0 and done % every == 0)
            if saves:
                self.progress.add_checkpoint(self.save(done))
            self.progress.send(force=saves)
        self._take(iterations)  # the driver lets go when it has evaluated the last version

    def _begin(self) -> None:
        """Tell the driver where these learners stand."""
        generation = 0

        def call() -> None:
            nonlocal generation
            if self.trained is not None:
                self.trained.write("begin", start=self.start)
                generation = self.exchange.begin(self.start)

        self._together(call)
        shared = [generation]
        dist.broadcast_object_list(shared, src=0)
        self.generation = shared[0]

    def _take(self, iteration: int) -> Any:
        """The batch of an iteration, once the driver offers it."""
        taken: list[Any] = []

        def call() -> None:
            taken.append(self.exchange.take(iteration, patience(self.recipe), generation=self.generation))

        self._together(call)
        return ray.get(taken[0], timeout=self.settings.rollout_timeout)

    def _publish(self, version: int, batch: Experience | None) -> None:
        """Gather the policy whole and tell the driver; with a batch, also what it says of some of its rows."""
        probe = self.update.probe(batch) if batch is not None else None
        named = (
            (name.removeprefix(POLICY), tensor)
            for name, tensor in self.engine.named_full_tensors()
            if name.startswith(POLICY)
        )
        ref = None
        if self.rank == 0:
            ref = publish(pack(named, version))
        else:
            for _ in named:  # the others' part is to hand over their experts and shards
                pass

        def call() -> None:
            if self.rank == 0:
                self.exchange.publish(version, ([ref], probe), generation=self.generation)

        self._together(call)

    def _together(self, call: Callable[[], None]) -> None:
        """Run ``call`` on every rank; if it is told anywhere that the run is stopped, all raise Stopped."""
        reason = None
        try:
            call()
        except Stopped as stopped:
            reason = stopped.reason
        is_stopped = torch.tensor([float(reason is not None)], device=self.device)
        if self.world > 1:
            dist.all_reduce(is_stopped)
        if is_stopped.item():
            raise Stopped(reason or "another learner was told to stop")

    def _check(self, iteration: int, metrics: dict[str, float]) -> None:
        """Stop the run where its parts disagree, or the loss is no number. All ranks find the same."""
        gap, limit = metrics.get("logprob_gap", 0.0), max_logprob_gap(self.recipe)
        reason = None
        if not gap <= limit:
            reason = gap_message("rollout actors'", iteration, gap, limit)
        for name in ("loss", "gradient_norm"):
            if reason is None and not math.isfinite(metrics[name]):
                reason = f"{name} of iteration {iteration + 1} is {metrics[name]}; lower ppo.learning_rate"
        if reason is not None:
            if self.rank == 0:
                self.exchange.stop(reason)
            raise Stopped(reason)

    def save(self, step: int) -> str:
        """Write, check and make current the checkpoint of ``step``; its folder."""
        metadata = {
            "step": step,
            "seed": self.recipe.run.seed,
            "kl": self.update.kl.state_dict(),
            "optimizer_steps": self.update.optimizer_steps,
        }

        def beside(folder: Path) -> None:
            ledger.copy_for_checkpoint(self.run_dir, step, folder / ledger.SAVED_FILE)
            link_files(self.run_dir / REFERENCE, folder / REFERENCE)

        return str(
            save(
                self.engine,
                self.store,
                self.tokenizer,
                step,
                metadata,
                self.rank,
                self.world,
                prefix=POLICY,
                beside=beside,
            )
        )


def patience(recipe: Recipe) -> float:
    """Seconds that a batch may take at the most, with everything slow that may be slow.

    An actor may hang, be replaced and hang again; rewards may take their time in every call, and once more sample by
    sample where a call fails.
    """
    ppo, reward = recipe.ppo, recipe.reward
    assert ppo is not None and reward is not None
    samples = ppo.prompts_per_iteration * ppo.samples_per_prompt
    calls = -(-samples // reward.batch) + samples
    rewards = -(-calls // ppo.reward_workers) * (1 + reward.retries) * reward.timeout
    return 3 * ppo.rollout_timeout + rewards + 60


def build_actor_critic(recipe: Recipe, folder: Path) -> ActorCritic:
    """The policy in ``folder`` with the critic that the recipe's algorithm asks for, in float32."""
    ppo = recipe.ppo
    assert ppo is not None
    policy = MMaDAForCausalLM.from_pretrained(
        folder, attn_implementation=recipe.model.attn_implementation, dtype=torch.float32
    )
    torch.manual_seed(recipe.run.seed)
    model = ActorCritic(policy, ppo.value_network if ALGORITHMS[ppo.algorithm].needs_values else "none")
    if recipe.train.gradient_checkpointing:
        model.recompute_activations()
    return model


def link_files(source: Path, target: Path) -> None:
    """A folder's files under another name; the same bytes on disk where the disk can do that."""
    target.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            (target / file.name).write_bytes(file.read_bytes())
