"""REINFORCE leave-one-out (arXiv:2402.14740): the mean of a prompt's other samples is the baseline.

A whole completion is one action: its ratio is the product over its tokens, clipped as PPO's when a batch is used more
than once; on the policy that sampled, the gradient is REINFORCE's.
"""

from __future__ import annotations

import torch

from mmada.training.advantages import group_advantages
from mmada.training.algorithms.base import (
    Advantages,
    AdvantageSettings,
    Algorithm,
    Counts,
    LossParts,
    LossSettings,
    PolicyBatch,
    ScoredBatch,
)
from mmada.training.algorithms.surrogate import (
    clipped_surrogate,
    kl_of_samples,
    log_ratio,
    report_kl,
    with_entropy,
)
from mmada.training.kl import shape_scores


def advantages(batch: ScoredBatch, settings: AdvantageSettings, kl_coefficient: float) -> Advantages:
    """(score - β · divergence of the completion) less the others' mean, the same for every token.

    Raises ValueError where the batch has no groups.
    """
    if batch.groups_B is None:
        raise ValueError("rloo asks for groups_B; say which completions are of one prompt")
    rewards_B = shape_scores(batch.scores_B, batch.finished_B, settings.missing_end_penalty, settings.score_clip)
    kl_BT = kl_of_samples(batch.logprobs_BT, batch.reference_logprobs_BT, batch.mask_BT, settings.kl_estimator)
    kl_B = None if kl_BT is None else kl_BT.sum(dim=1)
    if kl_B is not None:
        rewards_B = rewards_B - kl_coefficient * kl_B
    groups = group_advantages(rewards_B, batch.groups_B, "rloo")
    return Advantages(groups.advantages_N[:, None] * batch.mask_BT, kl_B=kl_B, groups=groups)


def loss(batch: PolicyBatch, settings: LossSettings, counts: Counts) -> LossParts:
    """The mean over completions of the clipped surrogate of whole completions, less the entropy of a token.

    ``clip_fraction``, ``ratio_mean`` and ``ratio_max`` are of completions.
    """
    log_ratio_BT = log_ratio(batch)
    ratio_B = log_ratio_BT.sum(dim=1).exp()
    num_sequences = max(1, counts.num_sequences)
    is_real_B = batch.mask_BT.bool().any(dim=1)  # rows that fill a micro batch up count for nothing
    policy_B = is_real_B * clipped_surrogate(ratio_B, batch.advantages_BT[:, 0], settings.clip_epsilon)
    parts = with_entropy(policy_B.sum() / num_sequences, log_ratio_BT, batch, settings, counts)
    with torch.no_grad():
        parts.clip_fraction = (is_real_B & ((ratio_B - 1).abs() > settings.clip_epsilon)).sum() / num_sequences
        parts.ratio_mean, parts.ratio_max = (is_real_B * ratio_B).sum() / num_sequences, (is_real_B * ratio_B).amax()
    return report_kl(parts, batch, settings, counts)


RLOO = Algorithm("rloo", advantages, loss, needs_values=False, uses_groups=True, kl_in="reward")
