"""The section of a recipe for ``mmada tune``: which of its keys are searched, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from jobs.recipe_schema_rl import Name, Positive, Section

Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
Whole = Annotated[list[int], Field(min_length=2, max_length=2)]


class DistributionSection(Section):
    """What a key is drawn from: exactly one of the first six."""

    uniform: Pair | None = None
    """[low, high]: a number between."""

    loguniform: Pair | None = None
    """[low, high]: a number between, each power of ten as likely as another."""

    quniform: Annotated[list[float], Field(min_length=3, max_length=3)] | None = None
    """[low, high, step]: a multiple of ``step`` from low to high; whole where all three are."""

    randint: Whole | None = None
    """[low, high]: a whole number, both included."""

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these values, of whatever kind the key has."""

    simplex: Annotated[list[Name], Field(min_length=2)] | None = None
    """Names, whose values are positive and sum to ``total``, every such point as likely as another: the key becomes a
    section of these names, or, where it holds a ``*``, one key for each name put in its place."""

    total: Annotated[float, Field(gt=0)] | None = None
    """What a simplex sums to; null: 1."""

    step: Annotated[float, Field(gt=0)] | None = None
    """The values of a simplex are multiples of it; null: any."""


class TuneSection(Section):
    """A search: trials are runs of this recipe with other values for some keys."""

    space: Annotated[dict[str, DistributionSection], Field(min_length=1)]
    """Keys of the recipe, dots and all, and what each is drawn from."""

    verb: Literal["train", "ppo"] = "train"
    """What a trial does with the recipe."""

    metric: Name | None = None
    """What an evaluation measures and the search looks at; null: what the verb's terminal shows of held-out data."""

    mode: Literal["min", "max"] | None = None
    """Whether less or more of it is better; null: by the metric, as for stages."""

    search: Literal["random", "grid", "optuna"] = "random"
    """``random`` draws, ``grid`` takes every combination, ``optuna`` learns where to look (TPE)."""

    scheduler: Literal["none", "asha", "median", "pbt"] = "none"
    """``asha`` stops what is behind at ever later steps, ``median`` what is worse than half of the others, ``pbt``
    (population-based training) lets it go on from the checkpoint of one ahead, with settings near its."""

    trials: Positive | None = None
    """How many; null: 10, and every combination for ``grid``."""

    max_concurrent: Positive | None = None
    """Trials at a time; null: as many as the cluster, or this machine's cores, have room for."""

    grace_period: Positive | None = None
    """Steps before a trial may be stopped; for ``pbt`` steps between two comparisons. null: a quarter of the run."""

    reduction_factor: Annotated[int, Field(ge=2)] = 4
    """``asha``: one of so many goes on beyond each rung."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes what is drawn; ``run.seed`` is the trials' own."""

    @property
    def how(self) -> str:
        """What draws trials and what stops them, in words."""
        return self.search if self.scheduler == "none" else f"{self.search}, {self.scheduler}"
