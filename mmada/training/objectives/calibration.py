"""Losses that make a model's confidence mean what it says, and the measure that they stand in for.

``confidence_N``: probability of the answer given; ``correct_N``: 1 where it was right, else 0; ``probability_NV``: of
all classes. Only the confidences have gradients: whether an answer is right is no function that the graph knows.

# N predictions, V classes, M bins
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BINS = 15
TEMPERATURE = 0.01  # of the membership in a bin, in squared confidence
KERNEL_WIDTH = 0.4


@dataclass
class BinSums:
    """Of each bin: how many predictions fall into it, the sum of their confidences, and of those that were right, (M,).

    They add up over micro batches and workers.
    """

    count_M: Tensor
    confidence_M: Tensor
    correct_M: Tensor

    def stacked(self) -> Tensor:
        """(3, M)."""
        return torch.stack([self.count_M, self.confidence_M, self.correct_M])


def hard_bins(confidence_N: Tensor, correct_N: Tensor, num_bins: int = NUM_BINS) -> BinSums:
    """Equal bins [low, high); a confidence of exactly 1 goes into the last."""
    index_N = (confidence_N * num_bins).long().clamp(0, num_bins - 1)
    return BinSums(
        *(
            each.new_zeros(num_bins).index_add(0, index_N, each)
            for each in (torch.ones_like(confidence_N), confidence_N, correct_N.to(confidence_N.dtype))
        )
    )


def soft_bins(
    confidence_N: Tensor, correct_N: Tensor, num_bins: int = NUM_BINS, temperature: float = TEMPERATURE
) -> BinSums:
    """Each prediction in all bins, by softmax of -(distance to the bin's middle)² / temperature."""
    middle_M = (torch.arange(num_bins, device=confidence_N.device, dtype=confidence_N.dtype) + 0.5) / num_bins
    member_NM = (-(confidence_N[:, None] - middle_M).square() / temperature).softmax(dim=1)
    return BinSums(
        member_NM.sum(0), (member_NM * confidence_N[:, None]).sum(0), (member_NM * correct_N[:, None]).sum(0)
    )


def calibration_error(bins: BinSums) -> Tensor:
    """Σ_m |right_m - confidence_m| / N: the expected calibration error of hard bins; of soft ones its smooth form."""
    return (bins.correct_M - bins.confidence_M).abs().sum() / bins.count_M.sum().clamp(min=1e-12)


def soft_calibration_error(confidence_N: Tensor, correct_N: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The smooth form of the expected calibration error (after arXiv:2108.00106), a scalar; 0 of nothing."""
    return calibration_error(soft_bins(confidence_N, correct_N.to(confidence_N.dtype), temperature=temperature))


def mmce(confidence_N: Tensor, correct_N: Tensor, width: float = KERNEL_WIDTH) -> Tensor:
    """Maximum mean calibration error (Kumar et al. 2018, eq. 3), a scalar.

    sqrt(Σ_ij (c_i - r_i)(c_j - r_j) k(r_i, r_j)) / N with the Laplacian kernel exp(-|r_i - r_j| / width). Among sorted
    confidences the kernel is e^(r_i / width) · e^(-r_j / width) for i <= j, so that running sums do for all N² pairs.
    """
    if not len(confidence_N):
        return confidence_N.sum()
    confidence_N, order_N = confidence_N.sort()
    error_N = correct_N.to(confidence_N.dtype)[order_N] - confidence_N
    rising_N = (confidence_N / width).exp()
    up_to_N = (error_N * rising_N).cumsum(0)
    total = 2 * (error_N / rising_N * up_to_N).sum() - error_N.square().sum()
    # the root of 0 has no gradient
    return total.clamp(min=1e-12).sqrt() / len(confidence_N)


def brier_score(probability_NV: Tensor, target_N: Tensor) -> Tensor:
    """Σ_v (p_v - 1[v = target])², the mean over predictions (Brier 1950), a scalar; 0 of nothing."""
    picked_N = probability_NV.gather(1, target_N[:, None])[:, 0]
    return (probability_NV.square().sum(1) - 2 * picked_N + 1).sum() / max(1, len(target_N))
