"""What the reward model learns from: pairs of completions of which one is better.

# B pairs, 2 the better and the worse, H components
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RewardWeights:
    """How the terms are weighed. ``margin``: by how much the better must win; ``centering`` keeps rewards around 0."""

    margin: float = 0.0
    centering: float = 0.01
    proxies: float = 1.0
    confidence: float = 1.0


@dataclass
class RewardLosses:
    """Each the sum over the pairs; ``loss`` is to be minimised, the others are parts of it, unweighted and for reading.

    ``right`` counts the pairs that were ordered rightly.
    """

    loss: Tensor
    ranking: Tensor
    proxies: Tensor
    confidence: Tensor
    right: Tensor


def reward_losses(
    reward_B2: Tensor,
    confidence_B2: Tensor,
    components_B2H: Tensor,
    proxies_B2H: Tensor,
    weights: RewardWeights,
) -> RewardLosses:
    """−log σ(r_w − r_l − m) + c (r_w + r_l)² + λ (components − proxies)² + μ BCE(confidence, ordered rightly).

    The better completion comes first. The first two terms are TRL's (Bradley–Terry, with centering as in
    arXiv:2312.09244). A preference between totals says nothing of which component is which, so each is drawn to a
    proxy in [-1, 1] of its own where there is one (NaN where not): the mean over 2 H places, unknown ones counting 0,
    so that a batch's sum does not hang on how its pairs are spread over workers. The confidence of either completion
    is taught whether the pair was ordered rightly, which no other part has a gradient of. The weights by which the
    components make up the reward are those of the preferences only where these are drawn as Bradley and Terry say;
    where the better always wins, weight goes to whatever tells pairs apart best.
    """
    chosen_B, rejected_B = reward_B2.unbind(dim=1)
    ranking = -F.logsigmoid(chosen_B - rejected_B - weights.margin).sum()
    centering = (chosen_B + rejected_B).square().sum()
    known_B2H = ~proxies_B2H.isnan()
    errors_B2H = (components_B2H - proxies_B2H.nan_to_num()).square() * known_B2H
    proxies = errors_B2H.mean(dim=(1, 2)).sum()
    right_B = (chosen_B > rejected_B).to(reward_B2.dtype)
    confidence = F.binary_cross_entropy(confidence_B2, right_B[:, None].expand_as(confidence_B2), reduction="none")
    confidence = confidence.mean(dim=1).sum()
    loss = ranking + weights.centering * centering + weights.proxies * proxies + weights.confidence * confidence
    return RewardLosses(loss, ranking.detach(), proxies.detach(), confidence.detach(), right_B.sum())
