"""What a study is: a recipe, its variants, what is measured of them, and what their sources claim.

A variant is a list of overrides in the recipe's own words; every variant is trained with every seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TextTask:
    """Training on the recipe's text; held-out bits per byte in rows of each of ``lengths`` tokens.

    ``held_out_tokens``: held-out tokens that every length is measured on, the same ones.
    """

    lengths: tuple[int, ...]
    held_out_tokens: int = 32768
    unit: str = "held-out bits per byte"
    count_patches: bool = False

    def measures(self) -> list[str]:
        """Names of what is measured; with ``count_patches`` also how many bytes the patches have."""
        return [f"at {length}" for length in self.lengths] + ["bytes per patch"] * self.count_patches


@dataclass(frozen=True)
class RecallTaskSetting:
    """Training on associative recall; the share of right answers at each of ``lengths``.

    ``num_pairs`` pairs are told and asked for; rows of training have ``train.sequence_length`` tokens, and the
    longer a row, the further the questions lie from what answers them.
    """

    lengths: tuple[int, ...]
    num_pairs: int
    num_symbols: int
    rows: int = 256
    unit: str = "share of right answers"

    def measures(self) -> list[str]:
        """Names of what is measured."""
        return [f"at {length}" for length in self.lengths]


@dataclass(frozen=True)
class PolicyTask:
    """Reinforcement learning by ``mmada ppo`` from a model that ``mmada train`` has warmed up, once for each seed.

    ``warm_up``: overrides of the warm-up alone, which goes on by ``more_steps`` until it solves ``least_before`` of the
    held-out problems: where a model begins to understand differs between seeds. ``reward jitter`` is the variance of a
    batch's mean reward about its trend, ``gap`` the largest difference between learners' and actors'
    log-probabilities.
    """

    warm_up: tuple[str, ...] = ("train.min_learning_rate_ratio=1",)
    least_before: float = 0.15
    more_steps: int = 10
    unit: str = "held-out accuracy before and after"

    def measures(self) -> list[str]:
        """Names of what is measured."""
        return ["before", "after", "gain", "minutes", "reward variance", "reward jitter"]


@dataclass(frozen=True)
class TargetTask:
    """Whole runs of ``mmada train``, each until its evaluations find ``metric`` at ``target`` or above.

    The step of the first such evaluation counts; of a run that does not get there ``within`` so many steps it is these,
    and ``reached`` is 0: variants whose stages could last longer have no more time.
    """

    metric: str
    target: float
    within: int
    unit: str = "optimizer steps to the target"

    def measures(self) -> list[str]:
        """Names of what is measured."""
        return ["steps", "reached"]

    def of(self, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The measures of a run, from the metrics of its steps."""
        for row in rows:
            if row["step"] <= self.within and row.get(self.metric, 0.0) >= self.target:
                return {"steps": row["step"], "reached": 1.0}
        return {"steps": self.within, "reached": 0.0}


# Measures of ``CalibrationTask`` by the metrics of a run's last step.
_CALIBRATION = {
    "error": "held_out_calibration_error",
    "scaled error": "scaled_calibration_error",
    "temperature": "temperature",
    "bits per byte": "bits_per_byte",
}


@dataclass(frozen=True)
class CalibrationTask:
    """Whole runs of ``mmada train``: held-out calibration error at their end, as trained and at a fitted temperature.

    The recipe must have a weight of calibration, which may be 0, for this to be measured.
    """

    unit: str = "held out, at the end"

    def measures(self) -> list[str]:
        """Names of what is measured."""
        return [*_CALIBRATION]

    def of(self, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The measures of a run, from the metrics of its steps."""
        return {name: rows[-1][metric] for name, metric in _CALIBRATION.items()}


@dataclass(frozen=True)
class Claim:
    """The sources say that ``better`` does better than ``worse`` in ``measure``.

    ``worse_measure`` is what ``worse`` is measured by, where that is another. ``margin`` is how much worse ``better``
    may do and still count as no worse, for claims that something stays as it is; below 0 it must do that much better.
    ``lower_is_better``: of this measure, where it differs from the study's others. ``share``: of ``worse`` that
    ``better`` may reach at most.
    """

    better: str
    worse: str
    measure: str
    worse_measure: str | None = None
    margin: float = 0.0
    lower_is_better: bool | None = None
    share: float = 1.0

    def words(self) -> str:
        """The claim as a line of a table."""
        if self.share != 1:
            return f"{self.better} at most {self.share:g} of {self.worse}, {self.measure}"
        other = f"{self.worse} ({self.worse_measure})" if self.worse_measure else self.worse
        if self.margin < 0:
            return f"{self.better} ({self.measure}) at least {-self.margin:g} above {other}"
        if self.margin:
            return f"{self.better} ({self.measure}) within {self.margin:g} of {other}"
        return f"{self.better} before {other}, {self.measure}"


@dataclass(frozen=True)
class Study:
    """One comparison.

    ``recipe``: name of a shipped recipe. ``variants``: overrides by name. ``lower_is_better``: of its measures.
    ``claims``: what is said elsewhere and checked here. ``common``: overrides of all variants. ``first``: name of a
    recipe that is trained before, once; ``{first}`` in an override stands for the folder of its model.
    """

    title: str
    recipe: str
    task: TextTask | RecallTaskSetting | PolicyTask | TargetTask | CalibrationTask
    variants: Mapping[str, Sequence[str]]
    claims: Sequence[Claim]
    lower_is_better: bool
    common: Sequence[str] = field(default_factory=tuple)
    first: str | None = None

    def overrides(self, variant: str, seed: int, first: str = "") -> list[str]:
        """Everything that is set after the recipe's name; ``first``: folder of the model that was trained first."""
        keys = [*self.common, *self.variants[variant], f"run.seed={seed}"]
        return [key.replace("{first}", first) for key in keys]
