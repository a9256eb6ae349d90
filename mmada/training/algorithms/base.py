"""What every policy-gradient algorithm takes and gives.

An algorithm is two functions: from scores to advantages, once per batch, and from advantages to a loss, once per micro
batch. Losses are sums over explicit counts: with the counts of the whole minibatch, the losses and gradients of its
micro batches on all workers add up to those of the minibatch, however it is split.

# B completions, T tokens of a completion
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from mmada.training.advantages import GroupAdvantages


@dataclass
class ScoredBatch:
    """Sampled completions with their scores, on which advantages rest. Nothing here carries a gradient.

    ``scores_B``: what the completions are worth. ``mask_BT``: true for a completion's tokens, at the front of its row.
    ``logprobs_BT``: of the policy that sampled, when it sampled. ``reference_logprobs_BT``: of the reference, where one
    is paid for. ``values_BT``: the critic's expectation before each token, where there is a critic.
    ``groups_B``: int64, equal for completions of one prompt. ``finished_B``: true where the end token was made.
    """

    scores_B: Tensor
    mask_BT: Tensor
    logprobs_BT: Tensor
    reference_logprobs_BT: Tensor | None = None
    values_BT: Tensor | None = None
    groups_B: Tensor | None = None
    finished_B: Tensor | None = None


@dataclass(frozen=True)
class AdvantageSettings:
    """How scores become advantages; an algorithm reads what concerns it.

    ``gamma``, ``gae_lambda``, ``whiten_rewards``: ppo. ``kl_estimator``: where the divergence is a reward.
    ``missing_end_penalty``, ``score_clip``: all; see ``shape_scores``. ``baseline``: reinforce subtracts the batch's
    mean.
    """

    gamma: float = 1.0
    gae_lambda: float = 0.95
    kl_estimator: Literal["k1", "k3"] = "k1"
    whiten_rewards: bool = False
    missing_end_penalty: float = 0.0
    score_clip: float | None = None
    baseline: bool = True


@dataclass
class Advantages:
    """``advantages_BT``, 0 behind a completion; ``returns_BT``, what the critic should have expected (ppo).

    ``kl_B``: each completion's divergence from the reference, summed over its tokens, where it is a reward.
    ``groups``: what the comparison within groups found, where there is one.
    """

    advantages_BT: Tensor
    returns_BT: Tensor | None = None
    kl_B: Tensor | None = None
    groups: GroupAdvantages | None = None


@dataclass
class PolicyBatch:
    """What a loss sees of a micro batch; only ``logprobs_BT``, ``values_BT`` and ``entropy_BT`` carry gradients.

    ``logprobs_BT``: of the policy that learns. ``old_logprobs_BT``: of the version that sampled, as it recorded them,
    so that the ratio also covers how far the two are apart. ``old_values_BT``: the critic's, when the advantages were
    made. What stands where ``mask_BT`` is false does not matter.
    """

    logprobs_BT: Tensor
    old_logprobs_BT: Tensor
    advantages_BT: Tensor
    mask_BT: Tensor
    reference_logprobs_BT: Tensor | None = None
    returns_BT: Tensor | None = None
    values_BT: Tensor | None = None
    old_values_BT: Tensor | None = None
    entropy_BT: Tensor | None = None


@dataclass(frozen=True)
class LossSettings:
    """Weights and limits of a loss; an algorithm reads what concerns it.

    ``clip_epsilon``: how far a ratio may leave 1. ``value_clip_epsilon``: how far a value may leave the old one; None
    does not clip. ``kl_coefficient``: of k3 in the loss (grpo, dr_grpo). ``max_completion_tokens``: the longest
    completion that can be, by which dr_grpo divides.
    """

    clip_epsilon: float = 0.2
    value_clip_epsilon: float | None = 0.2
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    kl_coefficient: float = 0.0
    max_completion_tokens: int = 1


@dataclass(frozen=True)
class Counts:
    """Completion tokens and completions that a loss is the mean of: those of the whole minibatch, of all workers."""

    num_tokens: float
    num_sequences: float

    @classmethod
    def of(cls, mask_BT: Tensor) -> Counts:
        """Of one mask."""
        return cls(float(mask_BT.sum()), float(len(mask_BT)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.num_tokens + other.num_tokens, self.num_sequences + other.num_sequences)


@dataclass
class LossParts:
    """``total``, to be minimised, and detached scalars to report: shares that add up to means over the counts.

    ``policy``, ``value``, ``kl`` (k3 to the reference), ``entropy``: the terms without their coefficients.
    ``clip_fraction``: of ratios further from 1 than the limit. ``value_clip_fraction``: of values that moved further.
    ``approx_kl``: from the version that sampled, ρ - 1 - log ρ. ``ratio_mean``; ``ratio_max`` is no share: adding
    takes the greater. Terms that an algorithm has no input for are 0.
    """

    total: Tensor
    policy: Tensor
    value: Tensor
    kl: Tensor
    entropy: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    value_clip_fraction: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor

    def __add__(self, other: LossParts) -> LossParts:
        pairs = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        highest = torch.maximum(*pairs.pop("ratio_max"))
        return LossParts(**{name: mine + theirs for name, (mine, theirs) in pairs.items()}, ratio_max=highest)


AdvantageFunction = Callable[[ScoredBatch, AdvantageSettings, float], Advantages]
LossFunction = Callable[[PolicyBatch, LossSettings, Counts], LossParts]


@dataclass(frozen=True)
class Algorithm:
    """One algorithm.

    ``advantages(batch, settings, kl_coefficient)``: of a whole batch, which every worker has.
    ``loss(batch, settings, counts)``.
    ``needs_values``: a critic. ``uses_groups``: several samples of each prompt. ``kl_in``: where the divergence from
    the reference counts. ``whitens_advantages``: each minibatch's advantages are whitened before its loss, unless the
    run leaves that out. ``single_update``: one optimizer step per batch and no more.
    """

    name: str
    advantages: AdvantageFunction = field(repr=False)
    loss: LossFunction = field(repr=False)
    needs_values: bool
    uses_groups: bool
    kl_in: Literal["reward", "loss"]
    whitens_advantages: bool = False
    single_update: bool = False
