"""``mmada train``: one recipe, trained on Ray with DeepSpeed, tracked, resumable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import worker_start
from jobs.calibration import reliability_figures
from jobs.driver import Driver, start
from jobs.objectives.objective import Objective
from jobs.objectives.registry import prepare_objective
from jobs.recipe import Recipe
from jobs.run_record import RunRecord
from jobs.shrinking import training_for
from jobs.stage_spans import StageSpan, closing, opening, stage_spans
from mmada.plots.learning_curve import mark_stages


class TrainingRecord(RunRecord):
    """Keeps the loss, and what the last evaluation measured."""

    def __init__(self, held_out_metric: str) -> None:
        super().__init__()
        self.held_out_metric = held_out_metric
        self.held_out: dict[str, float] = {}

    def add(self, row: dict[str, Any]) -> dict[str, float]:
        """As every record does."""
        metrics = super().add(row)
        self.metrics["loss"] = row["loss"]
        if self.held_out_metric in row:
            for name in (self.held_out_metric, "held_out_accuracy"):
                if name in row:
                    self.metrics[name] = row[name]
            self.held_out = metrics
        return metrics


def run(recipe: Recipe) -> int:
    """Train a recipe that ``jobs.recipe_checks`` has passed; the exit code.

    Raises RecipeError, DataError or ClusterError before anything has started.
    """
    return start(recipe, prepare(recipe))


def prepare(recipe: Recipe) -> Callable[[Path], TrainingRun]:
    """Prepare what a recipe learns from; what makes its driver for a run's folder. Raises as ``run``."""
    objective = prepare_objective(recipe)
    return lambda run_dir: TrainingRun(recipe, run_dir, objective)


class TrainingRun(Driver):
    """The driver's side of supervised training."""

    record: TrainingRecord

    def __init__(self, recipe: Recipe, run_dir: Path, objective: Objective) -> None:
        self.objective = objective
        self._stage = 0.0  # number of the stage that the terminal has been told of
        super().__init__(recipe, run_dir, objective.fingerprint, objective.source)

    def make_record(self) -> RunRecord:
        """One that keeps the loss and the held-out figure."""
        return TrainingRecord(self.objective.held_out_metric)

    @property
    def steps(self) -> int:
        """``train.steps``."""
        return self.recipe.train.steps

    def announce(self) -> None:
        """How much there is to learn from."""
        self.line.say(f"data     {self.objective.announcement()}")

    def work(self) -> Callable[[dict[str, Any]], None]:
        """The training worker."""
        return worker_start.train

    def worker_config(self) -> dict[str, Any]:
        """Where prepared text is, if there is any."""
        prepared = self.objective.prepared
        return {"prepared": None if prepared is None else str(prepared)}

    def resized(self, recipe: Recipe, workers: int) -> Recipe:
        """The same batches, shared by fewer."""
        return training_for(recipe, workers)

    def words(self, row: dict[str, Any]) -> list[str]:
        """Loss, the held-out figure, speed."""
        stages = self.recipe.train.stages
        parts = [stages[int(row["stage"]) - 1].name] if stages is not None and "stage" in row else []
        parts += [f"loss {row['loss']:.4f}"]
        if (value := self.record.metrics.get(self.objective.held_out_metric)) is not None:
            parts.append(self.objective.headline(value))
        return [*parts, f"{row['tokens_per_second']:,.0f} tokens/s"]

    def stays(self, row: dict[str, Any]) -> bool:
        """Where there was an evaluation."""
        return self.objective.held_out_metric in row

    def before(self, row: dict[str, Any]) -> list[str]:
        """The stage that begins, or is gone on with."""
        if row.get("stage", self._stage) == self._stage:
            return []
        self._stage = row["stage"]
        return [opening(self.recipe.train, span) for span in self.spans() if span.number == self._stage]

    def heard(self, row: dict[str, Any]) -> None:
        """MLflow is told by a tag where a stage begins, Prometheus what was held out."""
        if (metric := self.objective.held_out_metric) in row:
            self.exported.held_out(metric, row[metric])
        curve = self.record.curves.get("stage", {})
        if "stage" in row and curve.get(row["step"] - 1) != row["stage"]:
            (span,) = [span for span in self.spans() if span.number == row["stage"]]
            self.tracker.tag({"stage": span.name, f"stage.{span.number}": f"{span.name}, from step {span.first}"})

    def spans(self, is_done: bool = False) -> list[StageSpan]:
        """The stages that have begun; none of a recipe without."""
        return stage_spans(self.recipe.train, self.record.curves.get("stage", {}), is_done)

    def summary(self, is_done: bool) -> dict[str, Any]:
        """The last step of every stage that has ended."""
        if self.recipe.train.stages is None:
            return {}
        return {"stages": {span.name: span.last for span in self.spans(is_done) if span.has_ended}}

    def figures(self) -> dict[str, Any]:
        """The learning curve; and where it was asked for, how far confidence can be believed."""
        name = self.recipe.run.name
        curve = self.objective.figure(self.record.curves, name)
        mark_stages(curve, [(span.first, span.name) for span in self.spans()])
        return {"learning_curve": curve, **reliability_figures(self.run_dir, name)}

    def closing(self) -> None:
        """Where stages ended, and the last evaluation in words."""
        if spans := self.spans(is_done=True):
            self.line.say(closing(spans))
        if self.record.held_out:
            self.line.say(f"done     {self.objective.closing(self.record.held_out)}")

    def what_next(self, mmada: str, checkpoint: str) -> list[str]:
        """What the objective has to try, and an export."""
        return [*self.objective.what_next(mmada, checkpoint), *super().what_next(mmada, checkpoint)]

    def how_to_go_on(self, checkpoint: str) -> str:
        """Stages are what a run began with: more of them is another run, which begins with this one's weights."""
        if self.recipe.train.stages is None:
            return super().how_to_go_on(checkpoint)
        return f"run.name={self.recipe.run.name}-more train.start_from={checkpoint}"
