"""Learning from one batch of experience: advantages, then epochs of minibatches.

Which trajectories make a minibatch is a function of (seed, iteration, epoch), and losses are sums over the whole
minibatch's counts, so that the number of workers and the size of micro batches change nothing but rounding.

# N trajectories of a batch, B of a micro batch, S tokens of a row, C completion tokens
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.engine import Engine
from jobs.recipe import Recipe
from jobs.recipe_schema_rl import PPOSection
from jobs.rl.experience import Experience
from jobs.rl.messages import Probe
from mmada.actor_critic import ActorCriticOutput
from mmada.training.advantages import explained_variance, whiten
from mmada.training.algorithms import (
    ALGORITHMS,
    Advantages,
    AdvantageSettings,
    Counts,
    LossParts,
    LossSettings,
    PolicyBatch,
    ScoredBatch,
)
from mmada.training.kl import AdaptiveKL, FixedKL

_PROBE_ROWS = 4  # of the last batch, scored by both sides at every publication


def num_epochs(ppo: PPOSection) -> int:
    """Passes over a batch."""
    return ppo.epochs or (4 if ppo.algorithm == "ppo" else 1)


def learning_rate_at(ppo: PPOSection, iteration: int) -> float:
    """A straight line up to ``ppo.learning_rate``, and one down to its share at the end."""
    rising = ppo.warmup_iterations
    if iteration < rising:
        return ppo.learning_rate * (iteration + 1) / rising
    left, low = (ppo.iterations - iteration) / (ppo.iterations - rising), ppo.min_learning_rate_ratio
    return ppo.learning_rate * (low + (1 - low) * left)


def kl_controller(ppo: PPOSection) -> FixedKL | AdaptiveKL:
    """What sets the price of leaving the reference."""
    if ppo.kl_target is None:
        return FixedKL(ppo.kl_coefficient)
    return AdaptiveKL(ppo.kl_coefficient, ppo.kl_target, ppo.kl_horizon)


@dataclass
class _Step:
    """One optimizer step: its loss parts over all workers, the gradient's norm, and this rank's view of its rows."""

    parts: LossParts
    gradient_norm: float
    gap: float


class PolicyUpdate:
    """One rank's learning. Every method is called by all ranks together, with the same batch."""

    def __init__(self, recipe: Recipe, engine: Engine, device: torch.device) -> None:
        assert recipe.ppo is not None
        self.settings, self.seed = recipe.ppo, recipe.run.seed
        self.engine, self.device = engine, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.algorithm = ALGORITHMS[recipe.ppo.algorithm]
        self.kl = kl_controller(recipe.ppo)
        self.optimizer_steps = 0

    def learn(self, iteration: int, batch: Experience) -> dict[str, float]:
        """Improve the policy on a batch; what there is to report of it."""
        values_NC, gap = None, math.nan
        if self.algorithm.needs_values:
            judged = self.judge(batch)
            values_NC, gap = judged.values_BC, _largest_gap(iteration, batch, judged.logprobs_BC)
        scored = _scored(batch, values_NC)
        advantages = self.algorithm.advantages(scored, self._advantage_settings(), self.kl.coefficient)
        learning_rate = learning_rate_at(self.settings, iteration)
        steps = [
            self._update(iteration, batch, scored, advantages, rows, learning_rate)
            for epoch in range(num_epochs(self.settings))
            for rows in self._minibatches(iteration, epoch, len(batch))
        ]
        if not self.algorithm.needs_values:  # before the first step the weights were those that were published
            gap = self._over_workers(torch.tensor(np.nan_to_num(steps[0].gap, nan=-1.0)), dist.ReduceOp.MAX).item()
        metrics = self._metrics(batch, scored, advantages, [step.parts for step in steps]) | {
            "gradient_norm": float(np.mean([step.gradient_norm for step in steps])),
            "learning_rate": learning_rate,
            "updates": float(len(steps)),
        }
        if gap >= 0:  # neither nothing to compare (NaN, -1)
            metrics["batch_logprob_gap"] = gap
        gaps = [metrics[name] for name in ("batch_logprob_gap", "probe_logprob_gap") if name in metrics]
        if gaps:
            metrics["logprob_gap"] = max(gaps)
        if advantages.kl_B is not None:
            self.kl.update(float(advantages.kl_B.mean()), len(batch))
        return metrics

    def _minibatches(self, iteration: int, epoch: int, num_rows: int) -> list[np.ndarray]:
        """Row numbers of each minibatch of an epoch: as many as the settings say, of sizes as equal as can be."""
        if self.algorithm.single_update:
            return [np.arange(num_rows)]
        order = np.random.default_rng([self.seed, iteration, epoch]).permutation(num_rows)
        return np.array_split(order, -(-num_rows // self.settings.minibatch))

    def _update(
        self,
        iteration: int,
        batch: Experience,
        scored: ScoredBatch,
        advantages: Advantages,
        rows: np.ndarray,
        learning_rate: float,
    ) -> _Step:
        """One optimizer step on a minibatch, of which this rank takes its part."""
        own, engine = np.array_split(rows, self.world)[self.rank], self.engine.settings
        everyone = torch.from_numpy(rows)
        advantages_NC = advantages.advantages_BT.clone()
        if self.algorithm.whitens_advantages and self.settings.whiten_advantages:
            advantages_NC[everyone] = whiten(advantages_NC[everyone], scored.mask_BT[everyone])
        counts = Counts.of(scored.mask_BT[everyone])
        total: LossParts | None = None
        gap = math.nan
        for micro in range(engine.accumulation):
            places = np.arange(micro * engine.micro_batch, (micro + 1) * engine.micro_batch)
            # Ranks make the same number of passes over as many rows; those beyond a rank's own count for nothing.
            chosen = own[np.minimum(places, len(own) - 1)] if len(own) else rows[: engine.micro_batch]
            output = self._forward(batch, chosen)
            width, index = output.logprobs_BC.shape[1], torch.from_numpy(chosen)
            is_own_B1 = torch.from_numpy(places < len(own))[: len(chosen), None]

            def of(tensor_NC: Tensor | None, index: Tensor = index, width: int = width) -> Tensor | None:
                return None if tensor_NC is None else tensor_NC[index, :width].to(self.device)

            mask_BC, old_BC, advantages_BC = of(scored.mask_BT), of(scored.logprobs_BT), of(advantages_NC)
            assert mask_BC is not None and old_BC is not None and advantages_BC is not None
            parts = self.algorithm.loss(
                PolicyBatch(
                    logprobs_BT=output.logprobs_BC,
                    old_logprobs_BT=old_BC,
                    advantages_BT=advantages_BC,
                    mask_BT=mask_BC & is_own_B1.to(self.device),
                    reference_logprobs_BT=of(scored.reference_logprobs_BT),
                    returns_BT=of(advantages.returns_BT),
                    values_BT=output.values_BC,
                    old_values_BT=of(scored.values_BT),
                    entropy_BT=output.entropy_BC,
                ),
                self._loss_settings(),
                counts,
            )
            # The engine takes the mean over workers and passes; these are shares of a sum.
            self.engine.backward(parts.total * self.world * engine.accumulation)
            parts.total = parts.total.detach()
            total = parts if total is None else total + parts
            gap = np.fmax(gap, _largest_gap(iteration, batch, output.logprobs_BC.detach(), chosen))
            self.engine.step(learning_rate)
        self.optimizer_steps += 1
        assert total is not None
        return _Step(self._sum_parts(total), self.engine.gradient_norm, float(gap))

    def _forward(self, batch: Experience, rows: np.ndarray) -> ActorCriticOutput:
        """The engine's judgement of some rows, cut to the longest of them."""
        lengths_B = batch.prompt_lengths_N[rows] + batch.completion_lengths_N[rows]
        ids_BS = torch.from_numpy(batch.input_ids_NS[rows, : lengths_B.max()])
        mask_BS = torch.arange(ids_BS.shape[1]) < torch.from_numpy(lengths_B)[:, None]
        return self.engine.forward(
            input_ids=ids_BS.to(self.device),
            attention_mask=mask_BS.long().to(self.device),
            prompt_lengths=torch.from_numpy(batch.prompt_lengths_N[rows]).to(self.device),
            num_completion_tokens=int(batch.completion_lengths_N[rows].max()),
            temperature=self.settings.temperature,
        )

    @torch.no_grad()
    def judge(self, batch: Experience) -> ActorCriticOutput:
        """Every trajectory under the weights as they stand, (N, C) each; ranks share the work, all get the whole."""
        num_rows, step = len(batch), self.engine.settings.micro_batch
        share = -(-num_rows // (self.world * step)) * step
        parts = []
        for first in range(self.rank * share, (self.rank + 1) * share, step):
            output = self._forward(batch, np.minimum(np.arange(first, first + step), num_rows - 1))
            judged = [x for x in (output.logprobs_BC, output.entropy_BC, output.values_BC) if x is not None]
            short = batch.logprobs_NC.shape[1] - output.logprobs_BC.shape[1]
            parts.append(torch.nn.functional.pad(torch.stack(judged), (0, short)))
        own = torch.cat(parts, dim=1)
        gathered = [torch.empty_like(own) for _ in range(self.world)]
        if self.world > 1:
            dist.all_gather(gathered, own)
        whole = (torch.cat(gathered, dim=1) if self.world > 1 else own)[:, :num_rows].cpu()
        return ActorCriticOutput(whole[0], whole[1], whole[2] if len(whole) > 2 else None)

    @torch.no_grad()
    def probe(self, batch: Experience) -> Probe:
        """Some rows of a batch with their log-probabilities under the weights as they stand."""
        rows = np.arange(min(_PROBE_ROWS, len(batch)))
        logprobs_BC = self._forward(batch, rows).logprobs_BC.cpu()
        found = Probe([], [], [])
        for row in rows:
            prompt, length = int(batch.prompt_lengths_N[row]), int(batch.completion_lengths_N[row])
            ids = batch.input_ids_NS[row].tolist()
            found.prompts.append(ids[:prompt])
            found.completions.append(ids[prompt : prompt + length])
            found.logprobs.append(logprobs_BC[row, :length].tolist())
        return found

    def _advantage_settings(self) -> AdvantageSettings:
        names = [each.name for each in fields(AdvantageSettings) if each.name in type(self.settings).model_fields]
        return AdvantageSettings(**{name: getattr(self.settings, name) for name in names})

    def _loss_settings(self) -> LossSettings:
        own = self.settings
        return LossSettings(
            clip_epsilon=own.clip_epsilon,
            value_clip_epsilon=own.value_clip_epsilon,
            value_coefficient=own.value_coefficient,
            entropy_coefficient=own.entropy_coefficient,
            kl_coefficient=self.kl.coefficient,
            max_completion_tokens=own.max_new_tokens,
        )

    def _over_workers(self, value: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if self.world > 1:
            value = value.to(self.device)
            dist.all_reduce(value, op=operation)
        return value

    def _sum_parts(self, parts: LossParts) -> LossParts:
        """Shares of a minibatch added up over the workers."""
        names = [each.name for each in fields(parts)]
        values = torch.stack([getattr(parts, name).detach().double() for name in names])
        highest = self._over_workers(values[names.index("ratio_max")].clone(), dist.ReduceOp.MAX)
        values = self._over_workers(values)
        values[names.index("ratio_max")] = highest
        return LossParts(**dict(zip(names, values.cpu(), strict=True)))

    def _metrics(
        self, batch: Experience, scored: ScoredBatch, advantages: Advantages, updates: list[LossParts]
    ) -> dict[str, float]:
        """Means over the updates of a batch, beside what its making cost."""
        metrics = {**batch.metrics, "tokens": float(batch.num_completion_tokens)}
        names = {"total": "loss", "policy": "policy_loss", "value": "value_loss", "kl": "reference_kl"}
        for each in fields(LossParts):
            metrics[names.get(each.name, each.name)] = float(np.mean([float(getattr(p, each.name)) for p in updates]))
        metrics["ratio_max"] = max(float(parts.ratio_max) for parts in updates)
        metrics["kl_coefficient"] = self.kl.coefficient
        if advantages.kl_B is not None:
            metrics["kl"] = float(advantages.kl_B.mean())  # nats per completion
        if scored.reference_logprobs_BT is None:  # nothing was compared
            del metrics["reference_kl"], metrics["kl_coefficient"]
        if scored.values_BT is None or advantages.returns_BT is None:
            del metrics["value_loss"], metrics["value_clip_fraction"]
        else:
            explained = explained_variance(scored.values_BT, advantages.returns_BT, scored.mask_BT)
            metrics["explained_variance"] = float(explained)
        if advantages.groups is not None:
            metrics["groups_without_signal"] = float(advantages.groups.num_zero_std + advantages.groups.num_single)
        return metrics


def _scored(batch: Experience, values_NC: Tensor | None) -> ScoredBatch:
    """A batch as algorithms take it."""
    column_C, reference = torch.arange(batch.logprobs_NC.shape[1]), batch.reference_logprobs_NC
    return ScoredBatch(
        scores_B=torch.from_numpy(batch.scores_N).float(),
        mask_BT=column_C < torch.from_numpy(batch.completion_lengths_N)[:, None],
        logprobs_BT=torch.from_numpy(batch.logprobs_NC),
        reference_logprobs_BT=None if reference is None else torch.from_numpy(reference),
        values_BT=values_NC,
        groups_B=torch.from_numpy(batch.groups_N),
        finished_B=torch.from_numpy(batch.is_ended_N),
    )


def _largest_gap(iteration: int, batch: Experience, logprobs_BC: Tensor, rows: np.ndarray | None = None) -> float:
    """Largest difference to what was recorded by the version that these weights are; NaN where none was."""
    rows = np.arange(len(batch)) if rows is None else rows
    is_current_B = batch.versions_N[rows] == iteration
    mask_BC = np.arange(logprobs_BC.shape[1]) < batch.completion_lengths_N[rows][:, None]
    recorded_BC = batch.logprobs_NC[rows, : logprobs_BC.shape[1]]
    difference = np.abs(logprobs_BC.float().cpu().numpy() - recorded_BC)[mask_BC & is_current_B[:, None]]
    return float(difference.max()) if difference.size else math.nan
