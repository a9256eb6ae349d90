"""``calibration``: the model's confidence in its next token means what it says.

# N predictions of this worker, A of all workers, W workers
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jobs.objectives.terms.term import Term, targets_of
from mmada.output import MMaDAOutput
from mmada.training.objectives.calibration import BinSums, brier_score, calibration_error, hard_bins, mmce, soft_bins


class Calibration(Term):
    """One of several losses by ``objectives.calibration``; the hard calibration error is reported with each."""

    def of(
        self, output: MMaDAOutput, batch: dict[str, Tensor], share: Tensor, seen: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Term``; metrics ``calibration_error`` and ``training_accuracy``."""
        logits_NV, target_N = targets_of(output, batch)
        probability_NV = logits_NV.softmax(dim=-1)
        confidence_N, answer_N = probability_NV.max(dim=-1)
        correct_N = (answer_N == target_N).to(confidence_N.dtype)
        hard = self.over_workers(hard_bins(confidence_N.detach(), correct_N).stacked())
        metrics = {"calibration_error": calibration_error(BinSums(*hard)), "training_accuracy": correct_N.sum() / share}
        kind = self.settings.calibration
        if kind == "brier":
            return brier_score(probability_NV, target_N) * len(target_N) / share, metrics
        if kind == "mmce":
            return self.own_part_of(mmce(*self._all_predictions(confidence_N, correct_N))), metrics
        soft = self.with_others(soft_bins(confidence_N, correct_N).stacked())
        return self.own_part_of(calibration_error(BinSums(*soft))), metrics

    def _all_predictions(self, confidence_N: Tensor, correct_N: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all workers, (A,) each, the confidences with this worker's gradients.

        The kernel compares every prediction with every other, so sums alone will not do.
        """
        rank, world = self.place.rank, self.place.world
        if world == 1:
            return confidence_N, correct_N
        count_W = torch.zeros(world, dtype=torch.long, device=confidence_N.device)
        count_W[rank] = len(confidence_N)
        counts = self.over_workers(count_W).tolist()
        before = sum(counts[:rank])
        places_2A = confidence_N.new_zeros(2, sum(counts))
        places_2A[:, before : before + len(confidence_N)] = torch.stack([confidence_N, correct_N])
        confidence_A, correct_A = self.with_others(places_2A)
        return confidence_A, correct_A
