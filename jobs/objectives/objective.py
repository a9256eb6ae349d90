"""What a run learns: one object, made from the recipe, that the driver and every worker ask.

``jobs.objectives.registry`` has the table of them. The driver's is made with the data prepared and checked, a worker's
opens what was prepared. Nothing here loads DeepSpeed, which the driver does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from jobs.recipe import Recipe
from jobs.stages import stages_of

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from cluster.engine import Engine
    from mmada.output import MMaDAOutput
    from mmada.pretrained import TrainableModel


class Rows(Protocol):
    """What a step's batch is drawn from, by number."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Tensors of these rows, the rows along the first dimension."""
        ...


class LabelledRows(Rows, Protocol):
    """Rows with ``shift_labels``: packed text, or problems with their answers."""

    @property
    def num_targets(self) -> int:
        """Labels in all rows together."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a worker stands among all: evaluation shares its rows out, and ``sum`` adds a tensor up over workers."""

    rank: int
    world: int
    device: torch.device
    sum: Callable[[Tensor], Tensor]


@dataclass
class StepResult:
    """Of one micro batch: ``loss`` is to be minimised; ``metrics``, ``loss`` the first, are detached and for reading.

    The mean of a metric over micro batches and workers is that of the whole batch. ``expert_load`` and
    ``num_patches`` as the model gives them. ``parts``: what the loss is made of, by name, unweighted and with
    gradients, and whatever else has a weight at this step.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    expert_load: Tensor | None
    num_patches: Tensor | None
    parts: dict[str, Tensor] = field(default_factory=dict)


class Extra(Protocol):
    """Terms beside the objective at one step; ``jobs.objectives.terms.term``."""

    def watching(self) -> Any:
        """A context that must be open while the model runs."""
        ...

    def of(
        self, output: MMaDAOutput, batch: dict[str, Tensor], share: Tensor, seen: Any
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by name, and what there is to read of them; ``seen`` is what ``watching`` gave."""
        ...


class Objective(ABC):
    """One entry of ``jobs.objectives.registry``. Attributes:

    held_out_metric: the metric of ``evaluate`` that tells how well it goes; the driver shows it and draws its curve.
    fingerprint: names the content of what is learned from.
    source: the key of the recipe that decides it, with its value.
    prepared: folder of prepared text, for the workers; None where they make their rows from the recipe.
    rows: what is learned from, in rows of ``train.sequence_length``.
    sources: names of what is mixed, in order; one where nothing is.
    """

    held_out_metric: str

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, fingerprint: str, rows: Rows, prepared: Path | None
    ) -> None:
        self.recipe, self.tokenizer, self.fingerprint = recipe, tokenizer, fingerprint
        self.rows, self.prepared = rows, prepared
        self.source = f"data.source={recipe.data.source}"
        self.sources: tuple[str, ...] = (recipe.data.source,)

    # In the driver.

    @classmethod
    @abstractmethod
    def model_class(cls) -> type[TrainableModel]:
        """What is trained. Imported when it is asked for, if it can be: models are much to load."""

    @classmethod
    @abstractmethod
    def prepare(cls, recipe: Recipe) -> Objective:
        """Read and check the data. Raises DataError or RecipeError, before anything has started."""

    @abstractmethod
    def announcement(self) -> str:
        """How much there is to learn from."""

    @abstractmethod
    def headline(self, value: float) -> str:
        """``held_out_metric`` in words, for a line of the terminal."""

    @abstractmethod
    def closing(self, metrics: dict[str, float]) -> str:
        """How the run ended, from the metrics of its last evaluation."""

    @abstractmethod
    def figure(self, curves: dict[str, dict[int, float]], title: str) -> Figure:
        """The learning curve; ``curves`` are metrics by step."""

    def what_next(self, mmada: str, checkpoint: str) -> list[str]:
        """Commands to try on what has been learned."""
        return [f"evaluate  {mmada} evaluate {checkpoint}"]

    # In the workers.

    @classmethod
    @abstractmethod
    def open(cls, recipe: Recipe, prepared: Path | None) -> Objective:
        """The same objective in a worker, from what ``prepare`` left in ``prepared``."""

    def check_stages(self) -> None:
        """In the driver: raise DataError where a stage's rows are too short for what it reads."""
        for stage in stages_of(self.recipe, self.sources):
            for name, weight in zip(self.sources, stage.weights, strict=True):
                if weight > 0:
                    self.rows_of(name, stage.sequence_length)

    def rows_of(self, source: str, length: int) -> Rows:
        """What is learned from of one of ``sources``, in rows of so many tokens."""
        if length != self.recipe.train.sequence_length:
            raise NotImplementedError(f"{type(self).__name__} has rows of one length")
        return self.rows

    def rows_depend_on_length(self, source: str) -> bool:
        """Whether a row of another length is another row, as in packed text."""
        return True

    def shares_of(self, source: str, length: int) -> np.ndarray | None:
        """How these rows compare in difficulty (``mmada.data.mixing.difficulty_shares``); None: they are all alike."""
        return None

    @classmethod
    def evaluated(cls, recipe: Recipe) -> set[str]:
        """Names of what ``evaluate`` measures under this recipe."""
        return {cls.held_out_metric}

    @abstractmethod
    def build_model(self) -> TrainableModel:
        """A new model, its weights a function of ``run.seed`` alone."""

    @abstractmethod
    def count(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the loss of a batch is divided by, and how many tokens are in it: scalars."""

    @abstractmethod
    def forward(
        self, engine: Engine, batch: dict[str, Tensor], share: Tensor, extra: Extra | None = None
    ) -> StepResult:
        """One micro batch through the engine; sums are divided by ``share``, not by what this micro batch holds.

        ``extra``: what is to be computed beside the objective, for those that know how.
        """

    @abstractmethod
    def evaluate(self, engine: Engine, place: Place, batch_rows: int, max_rows: int | None) -> dict[str, float]:
        """Metrics on what is held out (all of it, or the first ``max_rows`` rows), the same on all workers.

        The model is in evaluation mode.
        """

    def held_out(self) -> dict[str, LabelledRows]:
        """Held-out rows of a language model by source, the name empty where nothing is mixed; none where it is not."""
        return {}

    def settle(self, model: TrainableModel, saved: Path | None) -> list[str]:
        """Fill in what the recipe leaves to the data; ``saved``: a model's folder that knows it. What to say of it."""
        return []

    def finish(self, engine: Engine, place: Place, batch_rows: int) -> None:  # noqa: B027 (most have nothing left)
        """What is left to do with the model after the last step, before it is saved. In evaluation mode."""


def router_metrics(output: MMaDAOutput) -> dict[str, Tensor]:
    """What a forward pass in training says of its routers; nothing without experts."""
    if output.expert_load is None:
        return {}
    found = {
        "router_balance_loss": output.aux_loss,
        "router_z_loss": output.z_loss,
        "router_source_balance": output.source_balance,
    }
    return {name: value for name, value in found.items() if value is not None}
