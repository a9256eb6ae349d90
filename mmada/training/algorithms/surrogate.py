"""Terms that several algorithms share: means over counts, the clipped surrogate, what is reported.

# B completions, T tokens of a completion
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmada.training.algorithms.base import Counts, LossParts, LossSettings, PolicyBatch
from mmada.training.kl import KL_ESTIMATORS, k3

Mean = Callable[[Tensor, Tensor, LossSettings, Counts], Tensor]


def token_mean(x_BT: Tensor, mask_BT: Tensor, settings: LossSettings, counts: Counts) -> Tensor:
    """Every token counts the same."""
    return torch.where(mask_BT, x_BT, 0).sum() / max(1, counts.num_tokens)


def sequence_mean(x_BT: Tensor, mask_BT: Tensor, settings: LossSettings, counts: Counts) -> Tensor:
    """Every completion counts the same: the mean of the means over each one's tokens."""
    mean_B = torch.where(mask_BT, x_BT, 0).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)
    return mean_B.sum() / max(1, counts.num_sequences)


def constant_mean(x_BT: Tensor, mask_BT: Tensor, settings: LossSettings, counts: Counts) -> Tensor:
    """The sum over completions of the greatest length there can be, whatever their own."""
    return torch.where(mask_BT, x_BT, 0).sum() / (max(1, counts.num_sequences) * settings.max_completion_tokens)


def log_ratio(batch: PolicyBatch) -> Tensor:
    """log π - log π_old, (B, T), 0 behind a completion."""
    return torch.where(batch.mask_BT.bool(), batch.logprobs_BT - batch.old_logprobs_BT, 0)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_epsilon: float) -> Tensor:
    """max(-ρA, -clip(ρ, 1 ± ε) A), any shape, to be minimised (arXiv:1707.06347, eq. 7)."""
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantages)


def token_surrogate(batch: PolicyBatch, settings: LossSettings, counts: Counts, mean: Mean) -> LossParts:
    """The clipped surrogate of every token averaged by ``mean``, less the entropy."""
    log_ratio_BT = log_ratio(batch)
    policy_BT = clipped_surrogate(log_ratio_BT.exp(), batch.advantages_BT, settings.clip_epsilon)
    policy = mean(policy_BT, batch.mask_BT.bool(), settings, counts)
    return with_entropy(policy, log_ratio_BT, batch, settings, counts)


def with_entropy(
    policy: Tensor, log_ratio_BT: Tensor, batch: PolicyBatch, settings: LossSettings, counts: Counts
) -> LossParts:
    """``policy`` less the weighted entropy of a token, and what there is to report of every token.

    The entropy is a mean over tokens whatever the policy's term is a mean over, as in TRL.
    """
    mask_BT = batch.mask_BT.bool()
    total, zero = policy, policy.detach().new_zeros(())
    entropy = zero
    if batch.entropy_BT is not None:
        entropy = token_mean(batch.entropy_BT, mask_BT, settings, counts)
        total = total - settings.entropy_coefficient * entropy
    with torch.no_grad():
        ratio_BT = log_ratio_BT.exp()
        far_BT = ((ratio_BT - 1).abs() > settings.clip_epsilon).to(ratio_BT.dtype)
        clip_fraction, approx_kl, ratio_mean = (
            token_mean(x_BT, mask_BT, settings, counts) for x_BT in (far_BT, ratio_BT - 1 - log_ratio_BT, ratio_BT)
        )
        highest = ratio_BT.masked_fill(~mask_BT, 0).amax() if ratio_BT.numel() else zero
    return LossParts(
        total, policy.detach(), zero, zero, entropy.detach(), clip_fraction, approx_kl, zero, ratio_mean, highest
    )


def add_kl(parts: LossParts, batch: PolicyBatch, settings: LossSettings, counts: Counts, mean: Mean) -> LossParts:
    """``parts`` with the weighted k3 to the reference in the loss; unchanged without a reference.

    Raises:
        ValueError: the divergence has a price and there is no reference.
    """
    if batch.reference_logprobs_BT is None:
        if settings.kl_coefficient:
            raise ValueError(
                f"kl_coefficient={settings.kl_coefficient} asks for a reference; pass its log-probabilities"
            )
        return parts
    mask_BT = batch.mask_BT.bool()
    reference_BT = torch.where(mask_BT, batch.reference_logprobs_BT, 0)
    kl = mean(k3(torch.where(mask_BT, batch.logprobs_BT, 0), reference_BT), mask_BT, settings, counts)
    parts.total = parts.total + settings.kl_coefficient * kl
    parts.kl = kl.detach()
    return parts


def report_kl(parts: LossParts, batch: PolicyBatch, settings: LossSettings, counts: Counts) -> LossParts:
    """``parts`` with the mean k3 of a token to the reference, for those who pay it in the reward."""
    if batch.reference_logprobs_BT is not None:
        with torch.no_grad():
            kl_BT = k3(batch.logprobs_BT, batch.reference_logprobs_BT)
            parts.kl = token_mean(kl_BT, batch.mask_BT.bool(), settings, counts)
    return parts


def kl_of_samples(
    logprobs_BT: Tensor, reference_logprobs_BT: Tensor | None, mask_BT: Tensor, estimator: str
) -> Tensor | None:
    """The divergence of sampled tokens as the estimator sees it, (B, T), 0 behind a completion; None: no reference."""
    if reference_logprobs_BT is None:
        return None
    return torch.where(mask_BT.bool(), KL_ESTIMATORS[estimator](logprobs_BT, reference_logprobs_BT), 0)
