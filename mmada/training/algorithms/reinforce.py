"""REINFORCE (Williams 1992): the score-function estimator, the baseline that the others are measured against.

No critic, no ratio, no clipping: the gradient is that of the expected reward for completions of the policy as it is.
So a batch is good for one update, and completions of an older version bias it.
"""

from __future__ import annotations

import torch

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
from mmada.training.algorithms.surrogate import kl_of_samples, log_ratio, report_kl, with_entropy
from mmada.training.kl import shape_scores


def advantages(batch: ScoredBatch, settings: AdvantageSettings, kl_coefficient: float) -> Advantages:
    """score - β · divergence of the completion, less the mean over the batch unless ``baseline`` is off.

    The same for every token of a completion.
    """
    rewards_B = shape_scores(batch.scores_B, batch.finished_B, settings.missing_end_penalty, settings.score_clip)
    kl_BT = kl_of_samples(batch.logprobs_BT, batch.reference_logprobs_BT, batch.mask_BT, settings.kl_estimator)
    kl_B = None if kl_BT is None else kl_BT.sum(dim=1)
    if kl_B is not None:
        rewards_B = rewards_B - kl_coefficient * kl_B
    if settings.baseline:
        rewards_B = rewards_B - rewards_B.mean()
    return Advantages(rewards_B[:, None] * batch.mask_BT, kl_B=kl_B)


def loss(batch: PolicyBatch, settings: LossSettings, counts: Counts) -> LossParts:
    """-A · log π, summed over a completion's tokens, the mean over completions; less the entropy of a token."""
    mask_BT = batch.mask_BT.bool()
    policy = -torch.where(mask_BT, batch.advantages_BT * batch.logprobs_BT, 0).sum() / max(1, counts.num_sequences)
    parts = with_entropy(policy, log_ratio(batch).detach(), batch, settings, counts)
    return report_kl(parts, batch, settings, counts)


REINFORCE = Algorithm(
    "reinforce", advantages, loss, needs_values=False, uses_groups=False, kl_in="reward", single_update=True
)
