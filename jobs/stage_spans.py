"""From which step to which each stage of a run went, as the metrics tell: what a user and MLflow are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jobs.recipe_schema import TrainSection
from jobs.stages import stage_steps


@dataclass(frozen=True)
class StageSpan:
    """Steps ``first`` to ``last`` were those of stage ``number``, counted from 1, of which ``planned`` were allowed.

    ``has_ended``: no step of it is to come.
    """

    number: int
    name: str
    first: int
    last: int
    planned: int
    has_ended: bool

    @property
    def is_early(self) -> bool:
        """Whether it ended before its last step."""
        return self.has_ended and self.last - self.first + 1 < self.planned


def stage_spans(train: TrainSection, curve: Mapping[int, float], is_done: bool) -> list[StageSpan]:
    """The stages that have begun, in order.

    ``curve``: the metric ``stage`` by step. ``is_done``: the run has ended well, and so has its last stage.
    """
    spans: list[StageSpan] = []
    for number, stage in enumerate(train.stages or [], start=1):
        steps = [step for step, value in curve.items() if value == number]
        if not steps:
            continue
        first, last, planned = min(steps), max(steps), stage_steps(train, stage)
        is_behind = is_done or any(value > number for value in curve.values())
        spans.append(StageSpan(number, stage.name, first, last, planned, is_behind or last - first + 1 >= planned))
    return spans


def opening(train: TrainSection, span: StageSpan) -> str:
    """A stage that begins, or is gone on with, in a line for the terminal."""
    assert train.stages is not None
    at_most = " at most" if train.stages[span.number - 1].advance is not None else ""
    end = span.first + span.planned - 1
    return f"stage    {span.name}, {span.number} of {len(train.stages)}: steps {span.first} to {end}{at_most}"


def closing(spans: list[StageSpan]) -> str:
    """All stages of a run that is done, in a line for the terminal."""
    words = []
    for span in spans:
        early = f" (ended early, {span.planned} steps were allowed)" if span.is_early else ""
        words.append(f"{span.name} to step {span.last}{early}")
    return f"stages   {', '.join(words)}"


def can_end_early(train: TrainSection) -> bool:
    """Whether something may end a stage before its last step."""
    return any(stage.advance is not None for stage in train.stages or [])
