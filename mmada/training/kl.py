"""The price of leaving the reference policy, and rewards of tokens that hold it.

# B completions of a batch, T tokens of a completion
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmada.training.advantages import whiten


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log π - log π_ref, any shape: unbiased for KL(π ‖ π_ref) under samples of π, often negative.

    Names and properties: http://joschu.net/blog/kl-approx.html.
    """
    return logprobs - reference_logprobs


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """e^x - x - 1 with x = log π_ref - log π, any shape: unbiased as k1, never negative, of less variance.

    As a loss it is GRPO's (arXiv:2402.03300, eq. 4).
    """
    x = reference_logprobs - logprobs
    return torch.expm1(x) - x


KL_ESTIMATORS = {"k1": k1, "k3": k3}


class FixedKL:
    """A coefficient that stays."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def update(self, kl: float, num_completions: int) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


class AdaptiveKL:
    """A coefficient that steers the divergence towards a target (arXiv:1909.08593, section 2.2).

    e = clip(kl / target - 1, ±0.2), then coefficient · (1 + e · n / horizon). ``target`` in nats per completion;
    ``horizon`` in completions.
    """

    def __init__(self, coefficient: float = 0.2, target: float = 6.0, horizon: int = 10_000) -> None:
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_completions: int) -> None:
        """Answer to ``kl``, the mean over ``num_completions`` of each one's divergence, summed over its tokens."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * num_completions / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """What a continued run must know."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.coefficient = state["coefficient"]


def shape_scores(
    scores_B: Tensor,
    finished_B: Tensor | None = None,
    missing_end_penalty: float = 0.0,
    score_clip: float | None = None,
) -> Tensor:
    """Scores within ±``score_clip``, less the penalty where ``finished_B`` is false.

    ``finished_B``: the completion made its end token itself. The penalty is on top of the clip, as in TRL's PPO.

    Raises:
        ValueError: a penalty without ``finished_B``.
    """
    if score_clip is not None:
        scores_B = scores_B.clamp(-score_clip, score_clip)
    if missing_end_penalty and finished_B is None:
        raise ValueError(f"missing_end_penalty={missing_end_penalty} asks which completions finished; pass finished_B")
    return scores_B if finished_B is None else scores_B - missing_end_penalty * (~finished_B).to(scores_B.dtype)


def token_rewards(
    scores_B: Tensor,
    mask_BT: Tensor,
    kl_BT: Tensor | None = None,
    kl_coefficient: float = 0.0,
    whitened: bool = False,
) -> Tensor:
    """Rewards of tokens (B, T): -β · kl each, and the score on top at the completion's last token; 0 behind it.

    ``kl_BT`` estimates log π - log π_ref (``k1``) or its like, so a token that the policy likes more than the
    reference does costs. ``mask_BT`` is true for a completion's tokens, at the front of its row; a row without tokens
    has no place for its score. ``whitened``: variance 1 over all tokens, the mean kept.
    """
    mask_BT = mask_BT.bool()
    rewards_BT = scores_B.new_zeros(mask_BT.shape) if kl_BT is None else -kl_coefficient * kl_BT
    rewards_BT = rewards_BT.masked_fill(~mask_BT, 0)
    last_B1 = mask_BT.sum(dim=1, keepdim=True) - 1
    is_last_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) == last_B1
    rewards_BT = rewards_BT + is_last_BT * scores_B[:, None]
    return whiten(rewards_BT, mask_BT, shift_mean=False) if whitened else rewards_BT
