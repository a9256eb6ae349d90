"""Predicting the answers of tasks: completion-only learning, measured in bits per answer byte and by solving."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jobs.entropy_model import settle_saved_threshold
from jobs.evaluation import bits_per_byte
from jobs.evaluation_tasks import held_out_accuracy
from jobs.objectives.language_model import LanguageModelObjective
from jobs.objectives.objective import LabelledRows, Place
from jobs.recipe import Recipe
from jobs.task_source import load_recipe_tasks
from mmada.data import load_tokenizer
from mmada.data.task_rows import TaskRows

if TYPE_CHECKING:
    from cluster.engine import Engine
    from mmada.pretrained import TrainableModel

ACCURACY = "held_out_accuracy"  # share of held-out problems that are solved


class TaskObjective(LanguageModelObjective):
    """``train.objective=language_model`` on ``data.source=tasks``."""

    held_out_metric = "bits_per_answer_byte"
    held_out_label = "held out, bits per answer byte"
    rows: TaskRows

    def __init__(self, recipe: Recipe) -> None:
        """Raises DataError for problems without answers, or longer than a row."""
        self.tasks, length = load_recipe_tasks(recipe), recipe.train.sequence_length
        tokenizer = load_tokenizer(recipe.data.tokenizer)
        rows = TaskRows(self.tasks.train, tokenizer, length)
        super().__init__(recipe, tokenizer, self.tasks.fingerprint, rows, None)
        self.held_out_rows = TaskRows(self.tasks.held_out, tokenizer, length)

    @classmethod
    def prepare(cls, recipe: Recipe) -> TaskObjective:
        """Draw the problems: nothing is written."""
        return cls(recipe)

    @classmethod
    def open(cls, recipe: Recipe, prepared: Path | None) -> TaskObjective:
        """Draw the same problems."""
        return cls(recipe)

    def announcement(self) -> str:
        """In problems."""
        families = ", ".join(self.tasks.source.families)
        known = f" ({self.tasks.num_distinct:,} of them different)" if self.tasks.num_distinct < len(self.rows) else ""
        return f"{len(self.rows):,} problems to learn from{known}, {len(self.held_out_rows):,} held out: {families}"

    def headline(self, value: float) -> str:
        """In bits per byte of an answer."""
        return f"held out {value:.3f} bits/answer byte"

    def closing(self, metrics: dict[str, float]) -> str:
        """With the accuracy, where it was measured."""
        solved = metrics.get("held_out_accuracy")
        also = "" if solved is None else f", {100 * solved:.1f} % of {len(self.held_out_rows)} held-out problems solved"
        return f"{metrics['bits_per_answer_byte']:.3f} bits per held-out answer byte{also}"

    def rows_of(self, source: str, length: int) -> TaskRows:
        """The problems in rows of this length. Raises DataError for one that is longer."""
        return self.rows if length == self.rows.sequence_length else TaskRows(self.tasks.train, self.tokenizer, length)

    def rows_depend_on_length(self, source: str) -> bool:
        """A problem is the same row in any padding."""
        return False

    @classmethod
    def evaluated(cls, recipe: Recipe) -> set[str]:
        """Bits; and accuracy where every worker has the whole model, of all and of every level where there are some."""
        if not can_decode(recipe):
            return {cls.held_out_metric}
        levels = recipe.tasks.difficulty if recipe.tasks is not None else 0
        several = levels if isinstance(levels, list) and len(levels) > 1 else []
        return {cls.held_out_metric, ACCURACY, *map(accuracy_of_level, several)}

    def settle(self, model: TrainableModel, saved: Path | None) -> list[str]:
        """The threshold of byte patches, from the model that training begins with."""
        return settle_saved_threshold(model, saved)

    def evaluate(self, engine: Engine, place: Place, batch_rows: int, max_rows: int | None) -> dict[str, float]:
        """Bits per answer byte; and the share of problems solved greedily, where a worker has the whole model."""
        rows = self.held_out_rows
        bits = bits_per_byte(
            engine.forward, rows, num_bytes=rows.num_answer_bytes, batch_rows=batch_rows, max_rows=max_rows, place=place
        )
        return {"bits_per_answer_byte": bits} | (
            self._accuracy(engine.module, place, max_rows) if can_decode(self.recipe) else {}
        )

    def held_out(self) -> dict[str, LabelledRows]:
        """The held-out problems with their answers."""
        return {"": self.held_out_rows}

    def _accuracy(self, model: Any, place: Place, max_rows: int | None) -> dict[str, float]:
        """Workers take turns problem by problem. An answer may be as long as the longest right one."""
        items = self.tasks.held_out[:max_rows]
        own = items[place.rank :: place.world]
        levels = list(self.tasks.source.levels)
        right = torch.zeros(len(levels), dtype=torch.float64)
        if own:
            longest = max(self.rows.longest_completion, self.held_out_rows.longest_completion)
            new_tokens = min(longest, model.config.max_position_embeddings - self.held_out_rows.longest_prompt)
            found = held_out_accuracy(model, self.tokenizer, self.tasks, max_new_tokens=new_tokens, items=own)
            for answer in found.answers:
                right[levels.index(answer.item.level)] += answer.accuracy
        right = place.sum(right.to(place.device)).cpu()
        shares = {ACCURACY: float(right.sum()) / len(items)}
        for level, solved in zip(levels, right.tolist(), strict=True):
            if len(levels) > 1 and (count := sum(item.level == level for item in items)):
                shares[accuracy_of_level(level)] = solved / count
        return shares


def accuracy_of_level(level: int) -> str:
    """The metric's name."""
    return f"{ACCURACY}.level_{level}"


def can_decode(recipe: Recipe) -> bool:
    """Whether a worker has the whole model, and so can answer by itself."""
    return recipe.train.zero_stage < 3 and recipe.cluster.expert_parallel == 1
