"""GRPO done right (arXiv:2503.20783): neither the group's deviation nor a completion's own length divides.

GRPO's deviation makes questions that are nearly solved or nearly hopeless count more, and its length long wrong
answers count less.
"""

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
from mmada.training.algorithms.surrogate import add_kl, constant_mean, token_surrogate
from mmada.training.kl import shape_scores


def advantages(batch: ScoredBatch, settings: AdvantageSettings, kl_coefficient: float) -> Advantages:
    """score - mean within the group, the same for every token. Raises ValueError where the batch has no groups."""
    if batch.groups_B is None:
        raise ValueError("dr_grpo asks for groups_B; say which completions are of one prompt")
    scores_B = shape_scores(batch.scores_B, batch.finished_B, settings.missing_end_penalty, settings.score_clip)
    groups = group_advantages(scores_B, batch.groups_B, "dr_grpo")
    return Advantages(groups.advantages_N[:, None] * batch.mask_BT, groups=groups)


def loss(batch: PolicyBatch, settings: LossSettings, counts: Counts) -> LossParts:
    """GRPO's terms, the first two summed and divided by completions · ``max_completion_tokens``."""
    parts = token_surrogate(batch, settings, counts, constant_mean)
    return add_kl(parts, batch, settings, counts, constant_mean)


DR_GRPO = Algorithm("dr_grpo", advantages, loss, needs_values=False, uses_groups=True, kl_in="loss")
