"""``compute``: what gates that decide what is computed are expected to spend, and a price on it above a target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.objectives.objective import Place
from jobs.objectives.terms.operations import counted_costs, measured_costs, now
from jobs.objectives.terms.term import Term
from jobs.recipe import Recipe
from jobs.recipe_schema_stages import ObjectivesSection
from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM
from mmada.nn.observing import Live, live
from mmada.output import MMaDAOutput
from mmada.training.objectives.compute import GateCost, expected_cost, hinge, time_hinge


@dataclass
class Pass:
    """One pass of the model: what its gates were, and how long it took."""

    gates: Live
    seconds: float = 0.0


class Compute(Term):
    """A hinge on expected operations, or on expected time where ``objectives.compute_cost=seconds``.

    ``kept``: the measured seconds per token of both ways through every gate. Rank 0 measures and all take its numbers,
    so that workers, and a run that goes on elsewhere, weigh alike.
    """

    def __init__(self, recipe: Recipe, model: MMaDAForCausalLM, place: Place, kept: Mapping[str, Any]) -> None:
        super().__init__(recipe, model, place, kept)
        self.operations = counted_costs(model)
        self.seconds: dict[str, GateCost] = {}
        if self.settings.compute_cost == "seconds":
            self.kept = kept or self._measure()
            self.seconds = {name: GateCost(*self.kept[name]) for name in self.operations}

    @classmethod
    def refusal(cls, settings: ObjectivesSection, config: MMaDAConfig) -> str | None:
        """Where no gate decides what is computed."""
        if "hybrid" in (config.mixer_types or []) and config.hybrid.fusion == "routed":
            return None
        return (
            "prices gates that decide what is computed, and this model has none; use model.mixer_types=hybrid with "
            "model.hybrid.fusion=routed"
        )

    @contextmanager
    def watching(self) -> Iterator[Pass]:
        """The gates, and the clock where it is asked for."""
        started = self._now()
        with live(self.model, "gate") as gates:
            seen = Pass(gates)
            yield seen
        seen.seconds = self._now() - started

    def of(
        self, output: MMaDAOutput, batch: dict[str, Tensor], share: Tensor, seen: Pass
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Term``; metrics ``expected_operations``, ``expected_seconds``, ``forward_seconds``, ``time_hinge``.

        The expected ones are shares of the most expensive way.
        """
        probabilities = self._probabilities(seen.gates)
        cost = expected_cost(probabilities, self.operations)
        metrics = {"expected_operations": cost.detach()}
        if self.seconds:
            cost = expected_cost(probabilities, self.seconds)
            metrics["expected_seconds"] = cost.detach()
        if (target := self.settings.time_target) is not None:
            measured = {"forward_seconds": seen.seconds, "time_hinge": time_hinge([seen.seconds], target)}
            metrics |= {name: torch.tensor(value, device=cost.device) for name, value in measured.items()}
        return self.own_part_of(hinge(cost, self.settings.compute_target)), metrics

    def _probabilities(self, gates: Live) -> dict[str, Tensor]:
        """The gates' means over the tokens of all workers; hinges on each worker's own would depend on their number."""
        names = [*self.operations]
        sums = torch.stack([gates.sums[name] for name in names])
        counts = sums.new_tensor([gates.counts[name] for name in names])
        sums, counts = self.with_others(torch.stack([sums, counts]))
        return dict(zip(names, sums / counts.clamp(min=1), strict=True))

    def _measure(self) -> dict[str, list[float]]:
        costs = measured_costs(self.model, self.recipe.train.sequence_length) if self.place.rank == 0 else {}
        both = [(costs[name].open, costs[name].shut) if costs else (0.0, 0.0) for name in self.operations]
        everyones = self.place.sum(torch.tensor(both, dtype=torch.float64, device=self.place.device))
        return dict(zip(self.operations, everyones.tolist(), strict=True))

    def _now(self) -> float:
        return now(self.place.device) if self.settings.time_target is not None else 0.0
