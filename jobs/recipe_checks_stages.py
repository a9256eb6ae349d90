"""What must fit together in a recipe with several sources, stages or objectives. Nothing here writes to disk."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.recipe import Recipe, RecipeError
from jobs.recipe_schema import AUTO
from jobs.recipe_schema_stages import ObjectivesSection, SourceSection, StageSection
from jobs.stages import PARTS, pattern_of, stage_steps
from jobs.wording import listed, shown, suggestion

if TYPE_CHECKING:
    from mmada.config import MMaDAConfig


def check_sources(recipe: Recipe) -> None:
    """``data.sources`` stand where they are read, and each has what it needs. Raises RecipeError."""
    data = recipe.data
    if data.source != "mixture":
        if data.sources is not None:
            raise RecipeError(
                f"data.sources={listed(data.sources)} have no part in data.source={data.source}; use "
                "data.source=mixture, or leave them out"
            )
        return
    if data.sources is None:
        raise RecipeError(
            "data.sources=null gives data.source=mixture nothing to mix; name sources, such as "
            "data.sources={text: {source: stdlib}}"
        )
    if recipe.train.objective != "language_model":
        raise RecipeError(
            f"train.objective={recipe.train.objective} does not learn from data.source=mixture; use "
            "train.objective=language_model, or one source"
        )
    for name, source in data.sources.items():
        check_source(f"data.sources.{name}", source)


def check_source(where: str, source: SourceSection) -> None:
    """One source's keys go with what it is. Raises RecipeError."""
    if not re.fullmatch(r"[a-z0-9_-]+", where.removeprefix("data.sources.")):
        raise RecipeError(f"{where} cannot name metrics; use small letters, digits, '_' and '-'")
    if (source.source == "tasks") != (source.tasks is not None):
        remedy = "give its tasks section" if source.tasks is None else "leave tasks out, or use source: tasks"
        raise RecipeError(f"{where}.source={source.source} with tasks={shown(source.tasks and '{…}')}; {remedy}")
    if source.source in ("files", "hub") and source.path is None:
        raise RecipeError(f"{where}.path=null gives source={source.source} nothing to read; set it")
    if source.source == "files" and source.path is not None and not Path(source.path).expanduser().exists():
        raise RecipeError(f"{where}.path={source.path} does not exist; give a text, JSONL or Parquet file or a folder")
    rule, tasks = source.difficulty, source.tasks
    if rule == "level" and (tasks is None or not isinstance(tasks.difficulty, list)):
        raise RecipeError(
            f"{where}.difficulty=level finds no levels; use source: tasks with tasks.difficulty as a list, such as "
            "[0, 1, 2]"
        )
    if rule == "length" and source.source != "tasks":
        raise RecipeError(
            f"{where}.difficulty=length is the same for all rows of packed text; use compression or loss there"
        )
    if (rule == "loss") != (source.difficulty_model is not None):
        remedy = "set it to a trained small model" if rule == "loss" else "use difficulty: loss, or leave it out"
        raise RecipeError(f"{where}.difficulty_model={shown(source.difficulty_model)} with difficulty={rule}; {remedy}")


def check_stages(recipe: Recipe) -> None:
    """Every stage can be run as it stands. Raises RecipeError naming the stage."""
    stages = recipe.train.stages
    if stages is None:
        return
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"train.stages: name={name} stands twice; give each stage its own name")
    if recipe.train.objective != "language_model":
        raise RecipeError(
            f"train.objective={recipe.train.objective} has no stages; leave train.stages out, or use language_model"
        )
    for stage in stages:
        where = f"train.stages.{stage.name}"
        check_length(recipe, where, stage)
        check_mixture(recipe, where, stage)
        check_range(where, stage)
        check_ways(recipe, where, stage)
        check_weights(f"{where}.loss_weights", stage.loss_weights)


def check_length(recipe: Recipe, where: str, stage: StageSection) -> None:
    """It has a length, and its batches divide among the workers."""
    train, workers = recipe.train, recipe.cluster.workers
    if (stage.steps is None) == (stage.tokens is None):
        said = "neither steps nor tokens" if stage.steps is None else "steps and tokens"
        raise RecipeError(f"{where} has {said}; give one of them")
    batch = stage.global_batch or train.global_batch
    if batch % workers:
        above = (batch // workers + 1) * workers
        raise RecipeError(f"{where}.global_batch={batch} is not divisible by cluster.workers={workers}; use {above}")
    micro = train.micro_batch
    if isinstance(micro, int) and (batch // workers) % micro:
        raise RecipeError(
            f"{where}.global_batch={batch} leaves a worker {batch // workers} rows, which train.micro_batch={micro} "
            "does not divide; use another of the two"
        )
    steps = stage_steps(train, stage)
    if stage.warmup_steps >= steps:
        raise RecipeError(
            f"{where}.warmup_steps={stage.warmup_steps} is not less than its {steps} steps; use at most {steps - 1}"
        )


def check_mixture(recipe: Recipe, where: str, stage: StageSection) -> None:
    """Its sources are there, and one of them weighs something."""
    if stage.mixture is None:
        return
    known = list(recipe.data.sources or [recipe.data.source])
    for name in stage.mixture:
        if name not in known:
            raise RecipeError(f"{where}.mixture.{name} is no source; {suggestion(name, known)}")
    if not any(weight > 0 for weight in stage.mixture.values()):
        raise RecipeError(f"{where}.mixture={shown(stage.mixture)} weighs nothing; give a source a weight above 0")


def check_range(where: str, stage: StageSection) -> None:
    """Its range of difficulty has something in it."""
    low, high = stage.difficulty
    if low >= high:
        raise RecipeError(f"{where}.difficulty={[low, high]} is empty; write the easier end first, as [0, 0.5]")


def check_ways(recipe: Recipe, where: str, stage: StageSection) -> None:
    """What its pacing and its way on listen to is measured, and often enough to be heard."""
    pacing, advance = stage.pacing, stage.advance
    if pacing is not None:
        listens = pacing.kind in ("source", "gated")
        if listens != (pacing.metric is not None):
            remedy = "name a metric of evaluations" if listens else "leave it out"
            raise RecipeError(f"{where}.pacing.metric={shown(pacing.metric)} with kind={pacing.kind}; {remedy}")
        if listens:
            check_metric(recipe, f"{where}.pacing", str(pacing.metric), stage)
        if not any(source.difficulty for source in (recipe.data.sources or {}).values()):
            raise RecipeError(
                f"{where}.pacing={pacing.kind} has no difficulties to go by; set data.sources.….difficulty, or leave "
                "pacing out"
            )
    if advance is not None:
        if (advance.when == "threshold") != (advance.threshold is not None):
            remedy = "set it" if advance.when == "threshold" else "leave it out"
            raise RecipeError(
                f"{where}.advance.threshold={shown(advance.threshold)} with when={advance.when}; {remedy}"
            )
        check_metric(recipe, f"{where}.advance", advance.metric, stage)


def check_metric(recipe: Recipe, where: str, metric: str, stage: StageSection) -> None:
    """An evaluation measures it, and there is one within the stage."""
    from jobs.objectives.registry import objective_class

    known = sorted(objective_class(recipe).evaluated(recipe))
    if metric not in known:
        raise RecipeError(f"{where}.metric={metric} is never evaluated; {suggestion(metric, known)}")
    every, steps = recipe.train.evaluate_every, stage_steps(recipe.train, stage)
    if not every or every > steps:
        raise RecipeError(
            f"{where}.metric={metric} is not evaluated within the stage's {steps} steps (train.evaluate_every={every})"
            f"; use train.evaluate_every={max(1, steps // 4)}, say"
        )


def check_weights(where: str, names: Iterable[str]) -> None:
    """The losses are there. Raises RecipeError."""
    from jobs.objectives.terms.table import LATER, PARTS, TERMS

    known = [*PARTS, *TERMS]
    for name in names:
        if name in LATER:
            raise RecipeError(f"{where}.{name} has nothing to be computed from yet; use {listed(known)}")
        if name not in known:
            raise RecipeError(f"{where}.{name} is no loss; {suggestion(name, known)}")


def check_terms(recipe: Recipe, config: MMaDAConfig) -> None:
    """Losses beside the objective have what they need. Raises RecipeError."""
    settings = recipe.objectives or ObjectivesSection()
    weighed = {"objectives.weights": [*settings.weights]}
    weighed |= {f"train.stages.{stage.name}.loss_weights": [*stage.loss_weights] for stage in recipe.train.stages or []}
    if not any(weighed.values()):
        return
    from jobs.objectives.terms.table import TERMS

    for where, names in weighed.items():
        for name in names:
            if recipe.train.objective != "language_model":
                raise RecipeError(
                    f"{where}.{name} has no part in train.objective={recipe.train.objective}; leave it out"
                )
            refusal = TERMS[name].refusal(settings, config) if name in TERMS else None
            if refusal is not None:
                raise RecipeError(f"{where}.{name} {refusal}")


def check_combination(recipe: Recipe) -> None:
    """Ways of weighing that look at gradients can see them whole, and all of a step's at once. Raises RecipeError."""
    from mmada.training.objectives.weighting import NEEDS_GRADIENTS

    own, train = recipe.objectives, recipe.train
    if own is None:
        return
    asks = {"combine": own.combine in NEEDS_GRADIENTS, "gradients_every": own.gradients_every > 0}
    looks = [name for name, does in asks.items() if does]
    if not looks:
        return
    value = getattr(own, looks[0])
    if train.zero_stage == 3:
        raise RecipeError(
            f"objectives.{looks[0]}={value} looks at whole gradients, which train.zero_stage=3 splits over the workers"
            "; use train.zero_stage=0, 1 or 2"
        )
    if looks[0] == "combine" and train.micro_batch == AUTO:
        raise RecipeError(
            f"objectives.combine={value} looks at the gradients of a whole step, and train.micro_batch=auto may cut it "
            "into several passes; leave train.micro_batch out"
        )
    if looks[0] == "combine" and train.micro_batch is not None and recipe.accumulation > 1:
        raise RecipeError(
            f"objectives.combine={value} looks at the gradients of a whole step, and train.micro_batch="
            f"{train.micro_batch} cuts it into {recipe.accumulation} passes; leave train.micro_batch out"
        )


def check_frozen(recipe: Recipe, config: MMaDAConfig) -> None:
    """What stages freeze is there, and something is left to learn. Raises RecipeError."""
    import torch

    from jobs.objectives.registry import objective_class

    stages = [stage for stage in recipe.train.stages or [] if stage.frozen]
    factors = recipe.train.learning_rate_factors
    if not stages and not factors:
        return
    with torch.device("meta"):
        names = [name for name, _ in objective_class(recipe).model_class()(config).named_parameters()]
    for field, entries in [
        *((f"train.stages.{stage.name}.frozen", stage.frozen) for stage in stages),
        ("train.learning_rate_factors", list(factors)),
    ]:
        for entry in entries:
            if not any(re.search(pattern_of(entry), name) for name in names):
                raise RecipeError(
                    f"{field}={entry} matches no parameter of this model; use {listed(PARTS)}, or a pattern such as "
                    f"{names[0]}"
                )
    for stage in stages:
        patterns = [pattern_of(entry) for entry in stage.frozen]
        if all(any(re.search(pattern, name) for pattern in patterns) for name in names):
            raise RecipeError(
                f"train.stages.{stage.name}.frozen={shown(stage.frozen)} leaves nothing to learn; leave a part out"
            )
