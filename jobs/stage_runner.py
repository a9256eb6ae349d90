"""Where a run of several stages stands: what a worker asks before, in and after every step.

All workers hold the same state and change it alike; a checkpoint keeps it, so that a run goes on from the middle of a
stage, or from its edge, as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.objectives.objective import Objective, Rows
from jobs.recipe import Recipe
from jobs.stages import Stage, pattern_of, stages_of
from mmada.data.mixing import Draw, RowsOfSource, draw_batch
from mmada.training.curriculum import (
    StageState,
    after_evaluation,
    after_step,
    competence,
    is_done,
    open_difficulty,
    schedule_position,
)
from mmada.training.objectives.weighting import WeightState, scheduled
from mmada.training.schedules import AdaptiveRate, Schedule

_LOOKED_AT = 64  # rows of each source among which ``longest_rows`` chooses


@dataclass
class Batch:
    """A global batch to be read: which source and row each place has, and the rows themselves by source."""

    draw: Draw
    rows_of: Callable[[int], Rows]
    num_sources: int

    def read(self, places: np.ndarray) -> dict[str, Tensor]:
        """The rows of these places, in their order."""
        sources = self.draw.sources_B[places]
        if self.num_sources == 1:
            return self.rows_of(0).batch(self.draw.rows_B[places])
        found: dict[str, Tensor] = {}
        for number in np.unique(sources).tolist():
            here = np.flatnonzero(sources == number)
            for name, value in self.rows_of(number).batch(self.draw.rows_B[places[here]]).items():
                whole = found.setdefault(name, value.new_empty(len(places), *value.shape[1:]))
                whole[torch.from_numpy(here)] = value
        return found

    def record_of(self, places: np.ndarray) -> np.ndarray:
        """What was read at these places: rows, or where there are several sources pairs of source and row."""
        if self.num_sources == 1:
            return self.draw.rows_B[places]
        return np.stack([self.draw.sources_B[places], self.draw.rows_B[places]], axis=1)


class StageRunner:
    """The stages of one run and its state in them; ``entered`` is true until a stage's settings have been taken up."""

    def __init__(self, recipe: Recipe, objective: Objective) -> None:
        self.recipe, self.objective = recipe, objective
        self.stages = stages_of(recipe, objective.sources)
        self.plans = [stage.plan for stage in self.stages]
        # What names the places of batches: one number for all stages, so that no two places have one name.
        self.largest_batch = max(stage.global_batch for stage in self.stages)
        self.state, self.weights, self.rate = StageState(), WeightState(), AdaptiveRate()
        self._rows: dict[tuple[str, int], Rows] = {}
        self._sizes: dict[tuple[str, int], RowsOfSource] = {}

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return is_done(self.plans, self.state)

    @property
    def stage(self) -> Stage:
        """The stage that the next step belongs to; behind the end the last."""
        return self.stages[min(self.state.stage, len(self.stages) - 1)]

    @property
    def begins_stage(self) -> bool:
        """Whether the next step is the first of its stage."""
        return self.state.step_in_stage == 0

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's metadata."""
        return {"stages": self.state.to_json(), "weights": self.weights.to_json(), "rate": self.rate.to_json()}

    def restore(self, saved: Mapping[str, Any] | None, step: int) -> None:
        """Go on from what ``to_json`` gave; or from ``step`` of a run that was saved before there were stages."""
        if saved is not None:
            self.state = StageState.from_json(saved["stages"])
            self.weights, self.rate = WeightState(**saved["weights"]), AdaptiveRate(**saved["rate"])
        if self.recipe.train.stages is not None:
            return
        # A run without stages may be given more steps, also after its last one.
        drawn = self.state.drawn
        if saved is None:
            (name,) = self.objective.sources
            length = self.stage.sequence_length
            rows = divmod(step * self.stage.global_batch, len(self._rows_of(name, length)))
            drawn = {self._key(name, length): rows}
        stage = int(step >= self.plans[0].steps)
        self.state = replace(self.state, step=step, stage=stage, step_in_stage=0 if stage else step, drawn=drawn)

    # Before a step.

    def draw(self) -> Batch:
        """The global batch of the next step; what has been read is noted with ``stepped``."""
        stage, names = self.stage, self.objective.sources
        length = stage.sequence_length
        nothing = RowsOfSource(0)  # what is not read at this stage need not fit its rows
        sizes = {
            self._key(name, length): self._size(name, length) if weight > 0 else nothing
            for name, weight in zip(names, stage.weights, strict=True)
        }
        draw, self._drawn = draw_batch(
            self.recipe.run.seed,
            self.state.step,
            stage.global_batch,
            sizes,
            stage.weights,
            open_difficulty(stage.plan, self.state),
            self.state.drawn,
        )
        return Batch(draw, lambda number: self._rows_of(names[number], length), len(names))

    def learning_rate(self) -> float:
        """Of the next step: the schedule over all stages as planned, the stage's factor, and its own warm-up."""
        train, stage = self.recipe.train, self.stage
        schedule = Schedule(
            train.learning_rate, train.steps, train.warmup_steps, train.min_learning_rate_ratio, train.decay_steps
        )
        rate = schedule.rate(train.schedule, schedule_position(self.plans, self.state)) * stage.learning_rate_factor
        if train.schedule == "adaptive":
            rate *= self.rate.scale(train.adaptive_noise, train.min_learning_rate_ratio)
        if self.state.step_in_stage < stage.warmup_steps:
            rate *= (self.state.step_in_stage + 1) / stage.warmup_steps
        return rate

    def weight_of(self, name: str) -> float:
        """What the recipe weighs a loss with at the next step: the stage's word, the run's, or 1 for the objective."""
        stage, objectives = self.stage, self.recipe.objectives
        general = (objectives.weights if objectives is not None else {}).get(name, float(name == "language_model"))
        share = self.state.step_in_stage / max(1, stage.plan.steps - 1)
        return scheduled(stage.loss_weights.get(name, general), share)

    def names_loss(self, name: str) -> bool:
        """Whether the recipe says what a loss weighs, if only 0, in the whole run or in some stage."""
        objectives = self.recipe.objectives
        general = objectives.weights if objectives is not None else {}
        return name in general or any(name in stage.loss_weights for stage in self.stages)

    def longest_rows(self, num: int) -> dict[str, Tensor]:
        """Rows of the stage's sources to see what a step takes: of some from all over each, those with most tokens.

        ``num`` of them along the first dimension, from the front again where there are fewer.
        """
        stage, found = self.stage, []
        for name, weight in zip(self.objective.sources, stage.weights, strict=True):
            if weight > 0:
                rows = self._rows_of(name, stage.sequence_length)
                found.append(rows.batch(np.unique(np.linspace(0, len(rows) - 1, _LOOKED_AT).astype(np.int64))))
        whole = {name: torch.cat([each[name] for each in found]) for name in found[0]}
        order = torch.arange(len(next(iter(whole.values()))))
        if "attention_mask" in whole:  # packed rows are full
            order = whole["attention_mask"].flatten(1).sum(1).argsort(descending=True, stable=True)
        chosen = order[torch.arange(num) % len(order)]
        return {name: value[chosen] for name, value in whole.items()} | {"sample_ids": torch.arange(num)}

    # After a step.

    def stepped(self, gradient_norm: float) -> dict[str, float]:
        """One step more; what there is to report of it."""
        stage = self.stage
        metrics = {"stage": float(self.state.stage + 1)} if self.recipe.train.stages is not None else {}
        if stage.plan.pacing is not None:
            metrics["competence"] = competence(stage.plan, self.state)
        if self.recipe.train.schedule == "adaptive":
            self.rate = self.rate.after_step(gradient_norm)
            metrics["gradient_noise"] = self.rate.noise
        self.state = replace(after_step(self.plans, self.state), drawn=self._drawn)
        return metrics

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """An evaluation may open more, end the stage, or lower the learning rate."""
        self.state = after_evaluation(self.plans, self.state, metrics)
        train = self.recipe.train
        if train.schedule == "adaptive":
            self.rate = self.rate.after_evaluation(
                metrics[self.objective.held_out_metric],
                decay=train.adaptive_decay,
                patience=train.adaptive_patience,
                min_delta=0.0,
            )

    # Rows.

    def _key(self, name: str, length: int) -> str:
        """Under which it is kept how far a source has been read: problems are the same rows at any length."""
        return f"{name}/{length}" if self.objective.rows_depend_on_length(name) else name

    def _rows_of(self, name: str, length: int) -> Rows:
        if (name, length) not in self._rows:
            self._rows[name, length] = self.objective.rows_of(name, length)
        return self._rows[name, length]

    def _size(self, name: str, length: int) -> RowsOfSource:
        if (name, length) not in self._sizes:
            shares_N = self.objective.shares_of(name, length)
            self._sizes[name, length] = RowsOfSource(len(self._rows_of(name, length)), shares_N)
        return self._sizes[name, length]


def freezable(recipe: Recipe) -> tuple[str, ...]:
    """Every pattern that some stage freezes, each once."""
    stages = recipe.train.stages or []
    return tuple(dict.fromkeys(pattern_of(name) for stage in stages for name in stage.frozen))


def factors(recipe: Recipe) -> tuple[tuple[str, float], ...]:
    """``train.learning_rate_factors`` as patterns."""
    return tuple((pattern_of(name), factor) for name, factor in recipe.train.learning_rate_factors.items())
