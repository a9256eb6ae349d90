"""From a recipe to its stages: a recipe without ``train.stages`` is a run of one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.recipe_schema import Recipe, TrainSection
from jobs.recipe_schema_stages import AdvanceSection, PacingSection, StageSection
from mmada.training.curriculum import Advance, Pacing, StagePlan

ONLY_STAGE = "train"  # its name where a recipe has no stages

# Parts of a model by name, as patterns of parameter names; what a recipe may call by a word.
PARTS: Mapping[str, str] = {
    "embeddings": r"(^|\.)(embed_tokens|lm_head)\.",
    "router": r"\.(mlp\.gate|mlp\.router|router_tap)\.",
    "experts": r"\.mlp\.experts\.",
    "memory": r"\.(memory|slots)\.",
    "gates": r"\.mixer\.(gate|opening)(\.|$)",
    "ssm": r"\.ssm\.",
    "patches": r"(^|\.)patches\.",
    "norms": r"norm\.weight$",
}


@dataclass(frozen=True)
class Stage:
    """One stage with every key filled in.

    ``weights``: of the sources in order. ``loss_weights``: by name, a number or from and to. ``frozen``: regular
    expressions of parameter names.
    """

    plan: StagePlan
    weights: tuple[float, ...]
    sequence_length: int
    global_batch: int
    loss_weights: Mapping[str, float | tuple[float, float]]
    frozen: tuple[str, ...]
    learning_rate_factor: float
    warmup_steps: int


def stages_of(recipe: Recipe, sources: Sequence[str]) -> list[Stage]:
    """The stages of a recipe whose data has these sources."""
    train = recipe.train
    everything = (1.0,) * len(sources)
    if train.stages is None:
        plan = StagePlan(ONLY_STAGE, train.steps)
        return [Stage(plan, everything, train.sequence_length, train.global_batch, {}, (), 1.0, 0)]
    return [_stage(train, each, sources) for each in train.stages]


def _stage(train: TrainSection, stage: StageSection, sources: Sequence[str]) -> Stage:
    mixture = stage.mixture
    low, high = stage.difficulty
    plan = StagePlan(
        stage.name,
        stage_steps(train, stage),
        (low, high),
        None if stage.pacing is None else _pacing(stage.pacing),
        None if stage.advance is None else _advance(stage.advance),
    )
    return Stage(
        plan=plan,
        weights=tuple(1.0 if mixture is None else mixture.get(name, 0.0) for name in sources),
        sequence_length=stage.sequence_length or train.sequence_length,
        global_batch=stage.global_batch or train.global_batch,
        loss_weights={
            name: (weight[0], weight[1]) if isinstance(weight, list) else weight
            for name, weight in stage.loss_weights.items()
        },
        frozen=tuple(pattern_of(name) for name in stage.frozen),
        learning_rate_factor=stage.learning_rate_factor,
        warmup_steps=stage.warmup_steps,
    )


def stage_steps(train: TrainSection, stage: StageSection) -> int:
    """The steps of a stage at most; of one that says neither steps nor tokens 0."""
    if stage.tokens is None:
        return stage.steps or 0
    per_step = (stage.global_batch or train.global_batch) * (stage.sequence_length or train.sequence_length)
    return math.ceil(stage.tokens / per_step)


def planned_steps(train: TrainSection) -> int:
    """The steps of the whole run at most."""
    if train.stages is None:
        return train.steps
    return sum(stage_steps(train, stage) for stage in train.stages)


def pattern_of(name: str) -> str:
    """The regular expression of a part's name, or of a pattern such as ``model.layers.0.*``."""
    if name in PARTS:
        return PARTS[name]
    return "^" + ".*".join(_escaped(piece) for piece in name.split("*")) + "$"


def _escaped(text: str) -> str:
    import re

    return re.escape(text)


def lower_is_better(metric: str) -> bool:
    """Whether a metric of evaluations is one that should fall: all but accuracies."""
    return "accuracy" not in metric


def _pacing(section: PacingSection) -> Pacing:
    metric = section.metric
    return Pacing(
        kind=section.kind,
        start=section.start,
        over=section.over,
        metric=metric,
        threshold=section.threshold,
        lower_is_better=metric is not None and lower_is_better(metric),
        times=section.times,
        rise=section.rise,
        smoothing=section.smoothing,
        ratchet=section.ratchet,
    )


def _advance(section: AdvanceSection) -> Advance:
    return Advance(
        kind=section.when,
        metric=section.metric,
        threshold=section.threshold or 0.0,
        lower_is_better=lower_is_better(section.metric),
        times=section.times,
        min_delta=section.min_delta,
    )
