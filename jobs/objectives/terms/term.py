"""What a language model may be trained on beside its text: calibration, the price of operations, nearness to a model.

A term is computed where it has a weight at the step, or is to be reported; a weight of 0 costs nothing. Sums over
predictions are added up over the workers before they are compared, with gradients of this worker's own part, so that
the loss does not depend on how many workers share a batch. With several micro batches each is taken by itself.

# N predictions, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from jobs.checkpoint_folder import model_folder
from jobs.objectives.objective import Place
from jobs.objectives.operations import gate_costs
from jobs.recipe import Recipe
from jobs.recipe_schema_stages import ObjectivesSection
from mmada.data import IGNORE_INDEX
from mmada.model import MMaDAForCausalLM
from mmada.nn.observing import Live, live
from mmada.output import MMaDAOutput
from mmada.training.objectives.calibration import (
    BinSums,
    brier_score,
    calibration_error,
    hard_bins,
    mmce,
    soft_bins,
)
from mmada.training.objectives.compute import expected_cost, hinge
from mmada.training.objectives.safety import divergence, squared_weights

CALIBRATION, COMPUTE, SAFETY = "calibration", "compute", "safety"


class Terms:
    """The terms of one recipe in one worker."""

    def __init__(self, recipe: Recipe, model: MMaDAForCausalLM, place: Place) -> None:
        self.settings = recipe.objectives or ObjectivesSection()
        self.model, self.place = model, place
        self.costs = gate_costs(model)
        self.reference: MMaDAForCausalLM | None = None
        if self.settings.safety_reference is not None:
            folder = model_folder(self.settings.safety_reference, "objectives.safety_reference")
            reference = MMaDAForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self.reference = reference.to(place.device).eval().requires_grad_(False)

    def watching(self, weights: Mapping[str, float]) -> AbstractContextManager[Live | None]:
        """What must be open while the model runs."""
        return live(self.model, "gate") if weights.get(COMPUTE) else nullcontext(None)

    def of(
        self,
        output: MMaDAOutput,
        batch: dict[str, Tensor],
        share: Tensor,
        weights: Mapping[str, float],
        gates: Live | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms that have a weight, as losses, and what there is to read of them; ``share`` as for the objective.

        The mean over workers and micro batches is that of the batch.
        """
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if weights.get(CALIBRATION):
            losses[CALIBRATION], more = self._calibration(output, batch, share)
            metrics |= more
        if weights.get(COMPUTE) and gates is not None:
            cost = expected_cost(gates.means, self.costs)
            losses[COMPUTE], metrics["expected_operations"] = hinge(cost, self.settings.compute_target), cost.detach()
        if weights.get(SAFETY):
            losses[SAFETY] = self._safety(output, batch, share)
            metrics["reference_divergence"] = losses[SAFETY].detach()
            metrics["squared_weights"] = squared_weights(self.model.parameters())
        return losses, metrics

    def _calibration(
        self, output: MMaDAOutput, batch: dict[str, Tensor], share: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits_NV, target_N = targets_of(output, batch)
        probability_NV = logits_NV.softmax(dim=-1)
        confidence_N, answer_N = probability_NV.max(dim=-1)
        correct_N = (answer_N == target_N).to(confidence_N.dtype)
        hard = self._over_workers(hard_bins(confidence_N.detach(), correct_N).stacked())
        metrics = {"calibration_error": calibration_error(BinSums(*hard)), "training_accuracy": correct_N.sum() / share}
        kind = self.settings.calibration
        if kind == "brier":
            return brier_score(probability_NV, target_N) * len(target_N) / share, metrics
        if kind == "mmce":
            return mmce(confidence_N, correct_N), metrics
        error = calibration_error(BinSums(*self._with_others(soft_bins(confidence_N, correct_N).stacked())))
        # All workers have the same value; each one's gradient is its own part, of which a step takes the mean.
        return error + (self.place.world - 1) * (error - error.detach()), metrics

    def _safety(self, output: MMaDAOutput, batch: dict[str, Tensor], share: Tensor) -> Tensor:
        assert self.reference is not None
        with torch.no_grad():
            inputs = {name: value for name, value in batch.items() if name not in ("shift_labels", "sample_ids")}
            reference = self.reference(**inputs, use_cache=False)
        logits_NV, _ = targets_of(output, batch)
        return divergence(logits_NV, targets_of(reference, batch)[0]) / share

    def _over_workers(self, value: Tensor) -> Tensor:
        return self.place.sum(value.detach().clone())

    def _with_others(self, own: Tensor) -> Tensor:
        """The sum over workers, with the gradient of this worker's part."""
        return own + (self._over_workers(own) - own.detach())


def targets_of(output: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (N, V) where something is to be predicted, in float32 at least, and what (N,)."""
    labels_BT = batch["shift_labels"]
    counts_BT = labels_BT != IGNORE_INDEX
    logits_NV = output.logits[counts_BT]
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), labels_BT[counts_BT]
