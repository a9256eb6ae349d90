"""One loss beside the objective: what each of them is, and how those of a step are computed together.

A new term is a file here with a subclass of ``Term``, and a line in ``jobs.objectives.terms.table``. A term is made
when it first has a weight, and computed at steps where it has one: without weight nothing of it is loaded, watched or
called.

# N predictions, V vocabulary
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.objectives.objective import Place
from jobs.recipe import Recipe
from jobs.recipe_schema_stages import ObjectivesSection
from mmada.config import MMaDAConfig
from mmada.data import IGNORE_INDEX
from mmada.model import MMaDAForCausalLM
from mmada.output import MMaDAOutput


class Term(ABC):
    """One loss of one run in one worker; all workers make and call it together.

    kept: what was measured when it was made and a run that goes on must find again, as plain values; a checkpoint
        holds it. Empty where there is nothing.
    """

    def __init__(self, recipe: Recipe, model: MMaDAForCausalLM, place: Place, kept: Mapping[str, Any]) -> None:
        self.recipe, self.settings = recipe, recipe.objectives or ObjectivesSection()
        self.model, self.place, self.kept = model, place, kept

    @classmethod
    def refusal(cls, settings: ObjectivesSection, config: MMaDAConfig) -> str | None:
        """Why it cannot be computed under these settings, as "reason; remedy" about the loss; None where it can."""
        return None

    def watching(self) -> AbstractContextManager[Any]:
        """What must be open while the model runs; ``of`` is given what it yields."""
        return nullcontext()

    @abstractmethod
    def of(
        self, output: MMaDAOutput, batch: dict[str, Tensor], share: Tensor, seen: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro batch, a scalar with gradients, unweighted; and what there is to read of it, detached.

        Sums over targets are divided by ``share``, as for the objective. The mean over workers and micro batches is
        that of the batch. The same names are read at every step.
        """

    # For losses that are no sum over predictions: sums are added up over the workers before they are compared, with
    # gradients of this worker's own part, so that the loss does not depend on how many workers share a batch. With
    # several micro batches each is taken by itself.

    def over_workers(self, value: Tensor) -> Tensor:
        """The sum over workers, detached."""
        return self.place.sum(value.detach().clone())

    def with_others(self, own: Tensor) -> Tensor:
        """The sum over workers, with the gradient of this worker's part."""
        return own + (self.over_workers(own) - own.detach())

    def own_part_of(self, loss: Tensor) -> Tensor:
        """A loss of ``with_others``, which all have alike: each one's gradient is its part, and a step takes the mean
        over workers, so it counts as often as there are workers."""
        return loss + (self.place.world - 1) * (loss - loss.detach())


@dataclass(frozen=True)
class StepTerms:
    """The terms that have a weight at one step, by name, as ``Objective.forward`` takes them."""

    terms: Mapping[str, Term]

    @contextmanager
    def watching(self) -> Iterator[dict[str, Any]]:
        """All of them watch while the model runs; what each is given."""
        with ExitStack() as stack:
            yield {name: stack.enter_context(term.watching()) for name, term in self.terms.items()}

    def of(
        self, output: MMaDAOutput, batch: dict[str, Tensor], share: Tensor, seen: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Their losses by name, and what there is to read of them."""
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            losses[name], more = term.of(output, batch, share, seen[name])
            metrics |= more
        return losses, metrics


def targets_of(output: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (N, V) where something is to be predicted, in float32 at least, and what (N,)."""
    labels_BT = batch["shift_labels"]
    counts_BT = labels_BT != IGNORE_INDEX
    logits_NV = output.logits[counts_BT]
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), labels_BT[counts_BT]
