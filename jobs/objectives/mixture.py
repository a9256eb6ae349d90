"""Learning from several sources at once: text and problems in one batch, each measured by itself.

Each source is an objective of its own, made from the recipe as if it were the only one; here they are put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from jobs.objectives.difficulty import shares_of_rows
from jobs.objectives.language_model import LanguageModelObjective
from jobs.objectives.objective import LabelledRows, Place, Rows
from jobs.objectives.tasks import TaskObjective
from jobs.objectives.text import TextObjective
from jobs.recipe import Recipe
from jobs.recipe_schema import DataSection

if TYPE_CHECKING:
    from cluster.engine import Engine
    from mmada.pretrained import TrainableModel

_KINDS: dict[str, type[TextObjective] | type[TaskObjective]] = {
    "stdlib": TextObjective,
    "files": TextObjective,
    "hub": TextObjective,
    "tasks": TaskObjective,
}


class MixtureObjective(LanguageModelObjective):
    """``train.objective=language_model`` on ``data.source=mixture``; in the loss a source counts by its targets."""

    held_out_metric = "held_out_bits"

    def __init__(self, recipe: Recipe, parts: dict[str, TextObjective | TaskObjective]) -> None:
        first = next(iter(parts.values()))
        fingerprint = " ".join(f"{name}:{part.fingerprint}" for name, part in parts.items())
        super().__init__(recipe, first.tokenizer, fingerprint, first.rows, None)
        self.parts, self.sources = parts, tuple(parts)

    @classmethod
    def prepare(cls, recipe: Recipe) -> MixtureObjective:
        """Prepare every source."""
        return cls(recipe, {name: _KINDS[own.data.source].prepare(own) for name, own in recipes_of(recipe).items()})

    @classmethod
    def open(cls, recipe: Recipe, prepared: Path | None) -> MixtureObjective:
        """The same: prepared text is found where it lies, problems are drawn again."""
        return cls.prepare(recipe)

    def announcement(self) -> str:
        """Source by source."""
        return "; ".join(f"{name}: {part.announcement()}" for name, part in self.parts.items())

    def headline(self, value: float) -> str:
        """The mean over sources."""
        return f"held out {value:.3f} bits/byte over {len(self.parts)} sources"

    def closing(self, metrics: dict[str, float]) -> str:
        """Source by source."""
        words = []
        for name, part in self.parts.items():
            own = {key.removesuffix(f".{name}"): each for key, each in metrics.items() if key.endswith(f".{name}")}
            words.append(f"{name}: {part.closing(own)}")
        return "; ".join(words)

    def rows_of(self, source: str, length: int) -> Rows:
        """Rows of one source; all sources' have the same tensors."""
        return AlikeRows(self.parts[source].rows_of(source, length), length)

    def rows_depend_on_length(self, source: str) -> bool:
        """As of the source alone."""
        return self.parts[source].rows_depend_on_length(source)

    def shares_of(self, source: str, length: int) -> np.ndarray | None:
        """By the source's own rule."""
        assert self.recipe.data.sources is not None
        section = self.recipe.data.sources[source]
        return shares_of_rows(section, self.parts[source], self.parts[source].rows_of(source, length), length)

    @classmethod
    def evaluated(cls, recipe: Recipe) -> set[str]:
        """Those of every source, with its name behind a dot, and their mean."""
        found = {cls.held_out_metric}
        for name, own in recipes_of(recipe).items():
            found |= {f"{metric}.{name}" for metric in _KINDS[own.data.source].evaluated(own)}
        if any(metric.startswith("held_out_accuracy") for metric in found):
            found.add("held_out_accuracy")
        return found

    def settle(self, model: TrainableModel, saved: Path | None) -> list[str]:
        """The threshold of byte patches, by the first source that can find it."""
        ordered: Sequence[TextObjective | TaskObjective] = sorted(
            self.parts.values(), key=lambda part: isinstance(part, TaskObjective)
        )
        return ordered[0].settle(model, saved)

    def evaluate(self, engine: Engine, place: Place, batch_rows: int, max_rows: int | None) -> dict[str, float]:
        """Every source's own figures, their mean in bits, and the mean accuracy of those that have one."""
        found: dict[str, float] = {}
        for name, part in self.parts.items():
            own = part.evaluate(engine, place, batch_rows, max_rows)
            found |= {f"{metric}.{name}": value for metric, value in own.items()}
        bits = [value for metric, value in found.items() if metric.startswith("bits_per_")]
        found[self.held_out_metric] = float(np.mean(bits))
        solved = [found[key] for name in self.parts if (key := f"held_out_accuracy.{name}") in found]
        return found | ({"held_out_accuracy": float(np.mean(solved))} if solved else {})

    def held_out(self) -> dict[str, LabelledRows]:
        """Every source's own."""
        return {name: rows for name, part in self.parts.items() for rows in part.held_out().values()}


class AlikeRows:
    """Rows with the same tensors whatever they hold: ids, labels, which tokens are real, and positions."""

    def __init__(self, rows: Rows, length: int) -> None:
        self.rows, self.length = rows, length

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Rows by number."""
        batch = self.rows.batch(indices)
        ids_BT = batch["input_ids"]
        if "attention_mask" not in batch:
            batch["attention_mask"] = torch.ones_like(ids_BT)
        if "position_ids" not in batch:
            batch["position_ids"] = torch.arange(self.length).expand(len(ids_BT), -1).contiguous()
        return batch


def recipes_of(recipe: Recipe) -> dict[str, Recipe]:
    """For every source the recipe as it would be if it were the only one."""
    assert recipe.data.sources is not None
    found = {}
    for name, section in recipe.data.sources.items():
        keys = section.model_dump(exclude={"tasks", "difficulty", "difficulty_model"})
        data = DataSection(**keys, tokenizer=recipe.data.tokenizer)
        found[name] = recipe.model_copy(update={"data": data, "tasks": section.tasks})
    return found
