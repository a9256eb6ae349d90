"""What all objectives that predict tokens have in common: the model, what a step computes, the curve."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jobs.model_building import build_model
from jobs.objectives.objective import Extra, Objective, StepResult, router_metrics
from mmada.data import IGNORE_INDEX
from mmada.plots.learning_curve import learning_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cluster.engine import Engine
    from mmada.model import MMaDAForCausalLM


class LanguageModelObjective(Objective):
    """``train.objective=language_model``; ``held_out_label``: the held-out figure in the curve's legend."""

    held_out_label = "held out, bits per byte"

    @classmethod
    def model_class(cls) -> type[MMaDAForCausalLM]:
        """The language model's."""
        from mmada.model import MMaDAForCausalLM

        return MMaDAForCausalLM

    def figure(self, curves: dict[str, dict[int, float]], title: str) -> Figure:
        """Loss and the held-out figure, both in bits."""
        loss, held_out = (curves.get(name, {}) for name in ("loss", self.held_out_metric))
        return learning_curve([*loss.items()], [*held_out.items()], title, held_out_label=self.held_out_label)

    def build_model(self) -> MMaDAForCausalLM:
        """The language model."""
        return build_model(self.recipe)

    def count(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Labels that count, and tokens that are no padding: all, where no mask says otherwise."""
        num_targets = (batch["shift_labels"] != IGNORE_INDEX).sum()
        mask = batch.get("attention_mask")
        return num_targets, torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum()

    def forward(
        self, engine: Engine, batch: dict[str, Tensor], share: Tensor, extra: Extra | None = None
    ) -> StepResult:
        """Cross entropy of all labels, with what the routers add to it, and whatever else has a weight."""
        with nullcontext() if extra is None else extra.watching() as seen:
            output = engine.forward(**batch, num_items_in_batch=share, use_cache=False)
        losses, more = ({}, {}) if extra is None else extra.of(output, batch, share, seen)
        metrics = {"loss": output.lm_loss, **router_metrics(output), **more}
        return StepResult(
            output.loss, metrics, output.expert_load, output.num_patches, {**(output.parts or {}), **losses}
        )
