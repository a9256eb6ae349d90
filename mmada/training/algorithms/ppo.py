"""Proximal policy optimisation for language (arXiv:1707.06347; for text arXiv:1909.08593, arXiv:2009.01325).

The details that decide whether it learns, after "The N implementation details of RLHF with PPO" (arXiv:2403.17031
checks most), and where each is honoured:

| detail | where |
|---|---|
| logits divided by the sampling temperature | log-probabilities come so: ``mmada.actor_critic``, ``mmada.generation`` |
| value head starts at 0 | ``mmada.actor_critic`` |
| reward head starts at N(0, 1 / sqrt(d + 1)), bias 0 | ``mmada.reward_model`` |
| reward brought to mean 0, variance 1 before it is used | ``mmada.reward_model``; after its training alone |
| reward model trained for one epoch | left to its recipe's ``train.steps``; the shipped one takes two |
| no dropout | ``mmada.actor_critic``, which never leaves evaluation |
| left padding with right positions | rows are padded at the right for learning; ``mmada.model`` reads either |
| padding and end token differ | ``mmada.tokenizer``; masks come from lengths, never from token ids |
| score at the last real token | ``token_rewards`` |
| penalty without an end token | ``shape_scores`` |
| divergence in the reward of each token, as -β (log π - log π_ref) | ``token_rewards`` |
| adaptive coefficient | ``mmada.training.kl.AdaptiveKL`` |
| rewards whitened without moving the mean, advantages with | ``token_rewards``, ``whiten`` |
| advantages whitened per minibatch, over micro batches and workers | the learner, every rank of which has them all |
| rewards whitened per batch, not per minibatch: γ and λ join tokens, not completions | ``advantages`` below |
| value loss with clipped values, half of the squared error | ``loss`` below |
| a minibatch is not a micro batch | ``Counts``: the loss does not depend on the split |
| Adam's epsilon 1e-5; learning rate falling to 0 | the learner's optimizer and schedule |
| another seed for every completion | the driver, from run, iteration, prompt and sample |
"""

from __future__ import annotations

import torch

from mmada.training.advantages import gae
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
from mmada.training.algorithms.surrogate import kl_of_samples, report_kl, token_mean, token_surrogate
from mmada.training.kl import shape_scores, token_rewards


def advantages(batch: ScoredBatch, settings: AdvantageSettings, kl_coefficient: float) -> Advantages:
    """Generalised advantages of every token, from the divergence at each and the score at the last.

    Raises:
        ValueError: there are no values.
    """
    if batch.values_BT is None:
        raise ValueError("ppo asks for values_BT; give the batch a critic's, or use grpo, rloo or reinforce")
    scores_B = shape_scores(batch.scores_B, batch.finished_B, settings.missing_end_penalty, settings.score_clip)
    kl_BT = kl_of_samples(batch.logprobs_BT, batch.reference_logprobs_BT, batch.mask_BT, settings.kl_estimator)
    rewards_BT = token_rewards(scores_B, batch.mask_BT, kl_BT, kl_coefficient, settings.whiten_rewards)
    advantages_BT, returns_BT = gae(rewards_BT, batch.values_BT, batch.mask_BT, settings.gamma, settings.gae_lambda)
    return Advantages(advantages_BT, returns_BT, None if kl_BT is None else kl_BT.sum(dim=1))


def loss(batch: PolicyBatch, settings: LossSettings, counts: Counts) -> LossParts:
    """Token means of the clipped surrogate, c_v · ½ max((V - R)², (clip(V, V_old ± ε_v) - R)²) and -c_e · entropy.

    Raises:
        ValueError: values, old values or returns are missing.
    """
    values_BT, old_values_BT, returns_BT = batch.values_BT, batch.old_values_BT, batch.returns_BT
    if values_BT is None or old_values_BT is None or returns_BT is None:
        raise ValueError("ppo asks for values_BT, old_values_BT and returns_BT; one of them is missing")
    mask_BT = batch.mask_BT.bool()
    parts = report_kl(token_surrogate(batch, settings, counts, token_mean), batch, settings, counts)
    moved_BT = torch.where(mask_BT, values_BT - old_values_BT, 0)
    squared_BT = torch.where(mask_BT, values_BT - returns_BT, 0).square()
    if settings.value_clip_epsilon is not None:
        limit = settings.value_clip_epsilon
        clipped_BT = torch.where(mask_BT, old_values_BT + moved_BT.clamp(-limit, limit) - returns_BT, 0)
        squared_BT = torch.maximum(squared_BT, clipped_BT.square())
        far_BT = (moved_BT.detach().abs() > limit).to(squared_BT.dtype)
        parts.value_clip_fraction = token_mean(far_BT, mask_BT, settings, counts)
    value = 0.5 * token_mean(squared_BT, mask_BT, settings, counts)
    parts.total = parts.total + settings.value_coefficient * value
    parts.value = value.detach()
    return parts


PPO = Algorithm("ppo", advantages, loss, needs_values=True, uses_groups=False, kl_in="reward", whitens_advantages=True)
