"""How a worker weighs the losses of a step: which are computed, what each is multiplied with, what is learned of it.

All workers weigh alike: what a weight depends on is summed over them first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cluster.engine import Engine
from jobs.objectives.objective import Place, StepResult
from jobs.objectives.terms.table import PARTS, TERMS
from jobs.objectives.terms.term import StepTerms, Term
from jobs.recipe import Recipe
from jobs.recipe_schema_stages import ObjectivesSection
from jobs.stage_runner import StageRunner
from mmada.training.objectives.weighting import (
    NEEDS_GRADIENTS,
    after_constraint,
    after_gradnorm,
    after_uncertainty,
    projection_coefficients,
    uncertainty_weights,
)


class Combination:
    """Weighs the losses of one run in one worker."""

    def __init__(self, recipe: Recipe, stages: StageRunner, model: Any, place: Place) -> None:
        self.recipe, self.stages, self.model, self.place = recipe, stages, model, place
        self.settings = recipe.objectives or ObjectivesSection()
        self._terms: dict[str, Term] = {}
        self.effective: dict[str, float] | None = None  # where it is the objective's own loss that is minimised
        self.norms: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._passes = 0

    def begin(self) -> StepTerms | None:
        """Before a step: what is to be computed beside the objective; None where that is nothing."""
        self._sums, self._passes, self.norms, self.effective = {}, 0, {}, None
        terms = {name: self._term(name) for name in TERMS if self.stages.weight_of(name) > 0}
        return StepTerms(terms) if terms else None

    def _term(self, name: str) -> Term:
        """Made when it first has a weight; what it wants kept is with the learned weights, in the checkpoint."""
        if name not in self._terms:
            kept = self.stages.weights.kept
            term = TERMS[name](self.recipe, self.model, self.place, kept.get(name, {}))
            if term.kept:
                self.stages.weights = replace(self.stages.weights, kept={**kept, name: term.kept})
            self._terms[name] = term
        return self._terms[name]

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
        if not weights:
            return 0 * torch.stack([*result.parts.values()]).sum()
        parts = [result.parts[name] * weight if weight != 1 else result.parts[name] for name, weight in weights.items()]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def finish(self) -> dict[str, float]:
        """After a step: learn what is to be learned of the weights; what there is to report."""
        if self.effective is None:
            return {}
        names = list(self._sums)
        sums_K = torch.stack([self._sums[name].double() for name in names])
        means = self.place.sum(sums_K / (self._passes * self.place.world)).tolist()
        losses = dict(zip(names, means, strict=True))
        self._learn(losses, self.effective)
        # A term may have a price of 0 while it is within its limit: it is measured all the same.
        weights = {name: self.effective.get(name, 0.0) for name in losses if name in self.effective or name in TERMS}
        found = {f"loss.{name}": losses[name] for name in weights}
        found |= {f"weight.{name}": value for name, value in weights.items()}
        return found | {f"gradient_norm.{name}": value for name, value in self.norms.items()}

    def _learn(self, losses: dict[str, float], effective: dict[str, float]) -> None:
        own, state = self.settings, self.stages.weights
        if own.combine == "uncertainty":
            weighed = {name: self._asked(name) * losses[name] for name in effective}
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
        if name not in stage and name not in general and (field := PARTS.get(name)) is not None:
            return getattr(self.model.config, field)
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
        named = {*self.stages.stage.loss_weights, *self.settings.weights} & PARTS.keys()
        usual = {name: 1.0 if field is None else getattr(self.model.config, field) for name, field in PARTS.items()}
        return all(self._asked(name) == usual[name] for name in named)

    def _measures_gradients(self) -> bool:
        every = self.settings.gradients_every
        return self.settings.combine in NEEDS_GRADIENTS or (every > 0 and self.stages.state.step % every == 0)
