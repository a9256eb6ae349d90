"""How a worker weighs the losses of a step: which are computed, what each is multiplied with, what is learned of it.

All workers weigh alike: what a weight depends on is summed over them first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.engine import Engine
from jobs.objectives.objective import Place, StepResult
from jobs.recipe import Recipe
from jobs.recipe_schema_stages import ObjectivesSection
from jobs.stage_runner import StageRunner
from mmada.output import MMaDAOutput
from mmada.training.objectives.weighting import (
    NEEDS_GRADIENTS,
    after_constraint,
    after_gradnorm,
    after_uncertainty,
    projection_coefficients,
    uncertainty_weights,
)

MAIN = "language_model"
TERMS = ("calibration", "compute", "safety")  # computed beside the objective, where they have a weight
_ROUTER = {"router_balance": "router_aux_loss_coef", "router_z": "router_z_loss_coef"}


@dataclass
class StepTerms:
    """The terms of one step, as ``Objective.forward`` takes them."""

    terms: Any
    weights: dict[str, float]

    def watching(self) -> AbstractContextManager[Any]:
        """As ``Terms.watching``."""
        return self.terms.watching(self.weights)

    def of(
        self, output: MMaDAOutput, batch: dict[str, Tensor], share: Tensor, seen: Any
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As ``Terms.of``."""
        return self.terms.of(output, batch, share, self.weights, seen)


class Combination:
    """Weighs the losses of one run in one worker."""

    def __init__(self, recipe: Recipe, stages: StageRunner, model: Any, place: Place) -> None:
        self.recipe, self.stages, self.model, self.place = recipe, stages, model, place
        self.settings = recipe.objectives or ObjectivesSection()
        self.terms: Any = None
        self.effective: dict[str, float] = {}
        self.norms: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._passes = 0

    def begin(self) -> StepTerms | None:
        """Before a step: what is to be computed beside the objective; None where that is nothing."""
        self._sums, self._passes, self.norms, self.effective = {}, 0, {}, {}
        weights = {name: self.stages.weight_of(name) for name in TERMS}
        if self.settings.safety_limit is not None and self.settings.weights.get("safety", 0.0) > 0:
            weights["safety"] = max(weights["safety"], 1.0)  # the price follows, the cost must be known from the start
        if not any(weights.values()):
            return None
        if self.terms is None:
            from jobs.objectives.terms import Terms

            self.terms = Terms(self.recipe, self.model, self.place)
        return StepTerms(self.terms, weights)

    def total(self, engine: Engine, result: StepResult) -> Tensor:
        """The loss of a micro batch. Where nothing is set it is the objective's own, to the bit."""
        measures = self._measures_gradients() and self._passes == 0
        self._passes += 1
        for name, part in result.parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(part)) + part.detach()
        if self._is_plain(result) and not measures:
            return result.loss
        weights = {name: self._weight(name) for name in result.parts}
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        names = list(weights)
        if measures and names:
            products_KK = engine.gradient_products([result.parts[name] for name in names])
            self.norms = dict(zip(names, products_KK.diagonal().clamp(min=0).sqrt().tolist(), strict=True))
            if self.settings.combine == "project":
                own_K = torch.tensor([weights[name] for name in names], dtype=torch.float64)
                weighed_KK = own_K[:, None] * products_KK.cpu() * own_K
                coefficients = projection_coefficients(weighed_KK, self.stages.state.step)
                weights = {name: weights[name] * float(c) for name, c in zip(names, coefficients, strict=True)}
        self.effective = weights
        if self._is_plain(result):
            return result.loss
        parts = [result.parts[name] * weight if weight != 1 else result.parts[name] for name, weight in weights.items()]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def finish(self) -> dict[str, float]:
        """After a step: learn what is to be learned of the weights; what there is to report."""
        if not self.effective and not self.norms:
            return {}
        names = list(self._sums)
        sums_K = torch.stack([self._sums[name].double() for name in names])
        means = self.place.sum(sums_K / (self._passes * self.place.world)).tolist()
        losses = {name: mean for name, mean in zip(names, means, strict=True) if name in self.effective}
        self._learn(losses)
        found = {f"loss.{name}": value for name, value in losses.items()}
        found |= {f"weight.{name}": value for name, value in self.effective.items()}
        return found | {f"gradient_norm.{name}": value for name, value in self.norms.items()}

    def _learn(self, losses: dict[str, float]) -> None:
        own, state = self.settings, self.stages.weights
        if own.combine == "uncertainty":
            weighed = {name: self._asked(name) * loss for name, loss in losses.items()}
            state = after_uncertainty(state, weighed, own.combine_rate)
        elif own.combine == "gradnorm" and self.norms:
            norms = {name: self._asked(name) * norm for name, norm in self.norms.items()}
            weighed = {name: losses[name] for name in norms}
            state = after_gradnorm(state, weighed, norms, alpha=own.gradnorm_alpha, rate=own.combine_rate)
        if own.safety_limit is not None and "safety" in losses:
            state = after_constraint(state, "safety", losses["safety"], own.safety_limit, own.safety_rate)
        self.stages.weights = state

    def _asked(self, name: str) -> float:
        """What the recipe weighs a loss with at this step."""
        stage, general = self.stages.stage.loss_weights, self.settings.weights
        if name in _ROUTER and name not in stage and name not in general:
            return getattr(self.model.config, _ROUTER[name])
        if name == "safety" and self.settings.safety_limit is not None:
            return self.stages.weights.multipliers.get("safety", 0.0)
        return self.stages.weight_of(name)

    def _weight(self, name: str) -> float:
        asked, state = self._asked(name), self.stages.weights
        if self.settings.combine == "uncertainty":
            return asked * uncertainty_weights(state, [name])[name]
        if self.settings.combine == "gradnorm":
            return asked * state.scales.get(name, 1.0)
        return asked

    def _is_plain(self, result: StepResult) -> bool:
        """Whether the objective's own loss is what is asked for."""
        if self.settings.combine != "fixed" or not result.parts:
            return not result.parts
        if any(name in TERMS for name in result.parts):
            return False
        named = {*self.stages.stage.loss_weights, *self.settings.weights} & {MAIN, *_ROUTER}
        usual = {MAIN: 1.0, **{name: getattr(self.model.config, field) for name, field in _ROUTER.items()}}
        return all(self._asked(name) == usual[name] for name in named)

    def _measures_gradients(self) -> bool:
        every = self.settings.gradients_every
        return self.settings.combine in NEEDS_GRADIENTS or (every > 0 and self.stages.state.step % every == 0)
