"""How much better than expected each token or completion was.

# B completions of a batch, T tokens of a completion, N completions in groups
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GROUP_EPSILON = 1e-4  # what GRPO adds to a group's standard deviation, as in TRL


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16): advantages and returns, (B, T) each.

    δ_t = r_t + γ V_{t+1} - V_t, A_t = δ_t + γλ A_{t+1}, return = A + V. ``mask_BT`` is true for a completion's tokens,
    which stand at the front of its row; the episode ends with the last of them, whether it is the end token or the
    completion was cut there, so no value is expected behind it. Where the mask is false both results are 0, whatever
    rewards and values say there.
    """
    mask_BT = mask_BT.bool()
    rewards_BT, values_BT = (x_BT.masked_fill(~mask_BT, 0) for x_BT in (rewards_BT, values_BT))
    advantages_BT = torch.zeros_like(rewards_BT + values_BT)
    next_value_B = next_advantage_B = advantages_BT.new_zeros(len(advantages_BT))
    for t in reversed(range(advantages_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = (delta_B + gamma * gae_lambda * next_advantage_B).masked_fill(~mask_BT[:, t], 0)
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT, advantages_BT + values_BT


def gae_reference(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """The sum that ``gae`` computes, written out: A_t = Σ_l (γλ)^l δ_{t+l} over the rest of the completion."""
    advantages_BT, returns_BT = torch.zeros_like(rewards_BT), torch.zeros_like(rewards_BT)
    for b, length in enumerate(mask_BT.sum(dim=1).tolist()):
        value = [*values_BT[b, :length].tolist(), 0.0]
        delta = [rewards_BT[b, t].item() + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            advantages_BT[b, t] = sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, length))
            returns_BT[b, t] = advantages_BT[b, t] + value[t]
    return advantages_BT, returns_BT


def whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True, unbiased: bool = True) -> Tensor:
    """Bring the masked entries to variance 1, and to mean 0 with ``shift_mean``; 0 where the mask is false.

    (x - μ) / sqrt(var + 1e-8), plus μ without ``shift_mean``. ``unbiased`` divides the squares by n - 1, as TRL does;
    without it by n, as in the first code of RLHF (openai/lm-human-preferences).
    """
    mask_BT = mask_BT.bool()
    x_BT = x_BT.masked_fill(~mask_BT, 0)
    wide_BT = x_BT.double()
    count = mask_BT.sum()
    mean = wide_BT.sum() / count.clamp(min=1)
    squares = (wide_BT - mean).square().masked_fill(~mask_BT, 0).sum()
    variance = squares / (count - int(unbiased)).clamp(min=1)
    whitened_BT = (wide_BT - mean) * torch.rsqrt(variance + 1e-8) + (0 if shift_mean else mean)
    return whitened_BT.masked_fill(~mask_BT, 0).to(x_BT.dtype)


@dataclass
class GroupAdvantages:
    """``advantages_N``, and of how many groups how many could say nothing: too small, or all scores the same.

    ``num_zero_std`` counts groups of two and more; those of one are in ``num_single``. Both have advantage 0.
    """

    advantages_N: Tensor
    num_groups: int
    num_single: int
    num_zero_std: int


def group_advantages(
    scores_N: Tensor,
    groups: int | Tensor,
    kind: Literal["grpo", "dr_grpo", "rloo"],
    *,
    unbiased: bool = True,
    epsilon: float = GROUP_EPSILON,
) -> GroupAdvantages:
    """Compare each completion's score with those of the other samples of its prompt.

    ``grpo``: (r - mean) / (std + ``epsilon``) (arXiv:2402.03300, section 4.1.2), the standard deviation with n - 1
    unless ``unbiased`` is false. ``dr_grpo``: r - mean (arXiv:2503.20783, eq. 3). ``rloo``: r minus the mean of the
    others (arXiv:2402.14740, eq. 8).

    ``groups``: the size of groups that follow one another, or (N,) int64, equal for completions of one prompt. Groups
    that lost members are as good as others with those that are left.

    Raises:
        ValueError: N is no multiple of the size, or ``groups`` has another length than the scores.
    """
    if isinstance(groups, int):
        if len(scores_N) % groups:
            raise ValueError(f"{len(scores_N)} scores are no whole groups of {groups}; pass the groups' ids")
        groups = torch.arange(len(scores_N), device=scores_N.device) // groups
    if groups.shape != scores_N.shape:
        raise ValueError(f"{len(scores_N)} scores have {len(groups)} group ids; pass one for each")
    ids, group_N = groups.unique(return_inverse=True)
    size_G = torch.bincount(group_N, minlength=len(ids)).to(scores_N.dtype)

    def sums(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(len(ids)).index_add(0, group_N, x_N)

    centred_N = scores_N - (sums(scores_N) / size_G)[group_N]
    low_G = scores_N.new_full((len(ids),), torch.inf).scatter_reduce(0, group_N, scores_N, "amin")
    high_G = scores_N.new_full((len(ids),), -torch.inf).scatter_reduce(0, group_N, scores_N, "amax")
    silent_G = low_G == high_G  # exactly: rounding in the mean must not be divided by a tiny deviation
    if kind == "grpo":
        variance_G = sums(centred_N.square()) / (size_G - int(unbiased)).clamp(min=1)
        advantages_N = centred_N / (variance_G.sqrt() + epsilon)[group_N]
    elif kind == "rloo":  # r - (S - r) / (n - 1) = (r - S / n) · n / (n - 1)
        advantages_N = centred_N * (size_G / (size_G - 1).clamp(min=1))[group_N]
    else:
        advantages_N = centred_N
    single = int((size_G == 1).sum())
    advantages_N = advantages_N.masked_fill(silent_G[group_N], 0)
    return GroupAdvantages(advantages_N, len(ids), single, int(silent_G.sum()) - single)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Share of the returns' variance that the values foresaw: 1 - var(returns - values) / var(returns), a scalar.

    1: exactly; 0: no better than their mean; NaN where all returns are the same.
    """
    mask_BT = mask_BT.bool()
    pairs_2N = torch.stack([(returns_BT - values_BT)[mask_BT], returns_BT[mask_BT]]).double()
    squares_2 = (pairs_2N - pairs_2N.mean(dim=1, keepdim=True)).square().sum(dim=1)
    return torch.where(squares_2[1] > 0, 1 - squares_2[0] / squares_2[1], torch.nan)
