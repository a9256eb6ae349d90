"""Group relative policy optimisation (arXiv:2402.03300): the other samples of a prompt are the baseline."""

from __future__ import annotations

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
from mmada.training.algorithms.surrogate import add_kl, sequence_mean, token_surrogate
from mmada.training.kl import shape_scores


def advantages(batch: ScoredBatch, settings: AdvantageSettings, kl_coefficient: float) -> Advantages:
    """(score - mean) / (std + 1e-4) within the group, the same for every token of a completion.

    The divergence is in the loss. Raises ValueError where the batch has no groups.
    """
    if batch.groups_B is None:
        raise ValueError("grpo asks for groups_B; say which completions are of one prompt")
    scores_B = shape_scores(batch.scores_B, batch.finished_B, settings.missing_end_penalty, settings.score_clip)
    groups = group_advantages(scores_B, batch.groups_B, "grpo")
    return Advantages(groups.advantages_N[:, None] * batch.mask_BT, groups=groups)


def loss(batch: PolicyBatch, settings: LossSettings, counts: Counts) -> LossParts:
    """The clipped surrogate and k3 to the reference, means over each completion, then over completions; the entropy."""
    parts = token_surrogate(batch, settings, counts, sequence_mean)
    return add_kl(parts, batch, settings, counts, sequence_mean)


GRPO = Algorithm("grpo", advantages, loss, needs_values=False, uses_groups=True, kl_in="loss")
