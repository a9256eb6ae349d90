"""Named curricula, which a recipe asks for with ``train.stages={preset: reasoning, factor: 0.01}``.

Order and lengths of ``reasoning`` and ``multimodal`` are those of the curricula that they are named after, 1000, 2000,
3000 and 5000 steps, and 10 000, 20 000 and 70 000. For ``features`` no lengths are known: 5 to 3 to 2, so that half of
the run goes to the foundation and the weighing of confidence, which moves least, takes the least. What else a stage
says is ours: it goes on with what the stages before it read, so that nothing is forgotten, opens its problems from the
easier end, and warms up where its data changes.

A preset becomes an ordinary list of stages when a recipe is read; nothing else knows of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.recipe_schema import RecipeError
from jobs.recipe_schema_stages import StagePresetSection
from jobs.wording import listed, suggestion

# What stays of the sources of earlier stages, each, beside a stage's own.
EARLIER_WEIGHT = 1.0
# Share of a stage's steps in which its learning rate rises again, as its data is new.
WARMUP_SHARE = 0.05
EASIER_FIRST = {"kind": "root", "start": 0.3, "over": 0.5}


@dataclass(frozen=True)
class PresetStage:
    """One stage of a preset.

    ``steps``: before ``factor``. ``source``: what it reads beside the earlier stages' sources, with its ``weight``.
    ``keys``: of ``StageSection``. ``needs``: what it cannot do without and nothing gives yet.
    """

    name: str
    steps: int
    source: str = ""
    weight: float = EARLIER_WEIGHT
    keys: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""


PRESETS: Mapping[str, tuple[PresetStage, ...]] = {
    "reasoning": (
        PresetStage("core", 1000, "core", keys={"pacing": EASIER_FIRST}),
        PresetStage("multi-hop", 2000, "multi_hop", 3.0, {"pacing": EASIER_FIRST}),
        PresetStage("causal", 3000, "causal", 3.0, {"pacing": EASIER_FIRST}),
        PresetStage("multimodal", 5000, needs="images"),
    ),
    "features": (
        PresetStage("foundation", 5000, "text"),
        PresetStage("enhanced", 3000, "tasks", keys={"pacing": EASIER_FIRST}),
        # To know how sure it is, and to spend no more than it must: calibration, and the price of its gates.
        PresetStage(
            "metacognition",
            2000,
            "tasks",
            keys={"learning_rate_factor": 0.5, "loss_weights": {"calibration": [0.0, 0.1], "compute": [0.0, 0.1]}},
        ),
    ),
    "multimodal": (
        PresetStage("text", 10_000, "text"),
        PresetStage("alignment", 20_000, needs="images"),
        PresetStage("multimodal", 70_000, needs="images"),
    ),
}


def stages_of_preset(section: StagePresetSection, sources: Collection[str]) -> list[dict[str, Any]]:
    """The preset's stages as a recipe would write them; ``sources`` are those of ``data.sources``.

    Raises RecipeError for what cannot be had: names that are not there, stages without a step, missing sources, images.
    """
    chosen = _chosen(section)
    for name in section.changes:
        if name not in [stage.name for stage in chosen]:
            known = [stage.name for stage in chosen]
            raise RecipeError(f"train.stages.changes.{name} is no stage of this run; {suggestion(name, known)}")
    stages: list[dict[str, Any]] = []
    read: list[str] = []
    for stage in chosen:
        steps = round(stage.steps * section.factor)
        if steps < 1:
            raise RecipeError(
                f"train.stages.factor={section.factor:g} leaves no step of the {stage.steps} of {stage.name}; use "
                f"{1 / min(each.steps for each in chosen):g} or more"
            )
        mixture = {source: EARLIER_WEIGHT for source in read if source != stage.source} | {stage.source: stage.weight}
        warmup = round(steps * WARMUP_SHARE) if stages else 0  # the first stage has that of the run
        own = {"name": stage.name, "steps": steps, "mixture": mixture, "warmup_steps": warmup, **stage.keys}
        changes = section.changes.get(stage.name, {})
        if "tokens" in changes:  # a length instead of the preset's
            own.pop("steps")
        stages.append(own | changes)
        read += [stage.source] if stage.source not in read else []
    _check_read(section.preset, stages, sources)
    return stages


def _chosen(section: StagePresetSection) -> Sequence[PresetStage]:
    """The stages of the preset that are asked for. Raises RecipeError."""
    preset, only = section.preset, section.only
    if preset not in PRESETS:
        raise RecipeError(f"train.stages.preset={preset} is no preset of stages; {suggestion(preset, PRESETS)}")
    if not section.factor > 0:
        raise RecipeError(f"train.stages.factor={section.factor:g} is out of range; use more than 0")
    stages = PRESETS[preset]
    known, possible = [stage.name for stage in stages], [stage.name for stage in stages if not stage.needs]
    if only == []:
        raise RecipeError(f"train.stages.only=[] leaves no stage of {preset}; name {listed(possible, 'and')}")
    for name in only or ():
        if name not in known:
            raise RecipeError(f"train.stages.only={name} is no stage of {preset}; {suggestion(name, known)}")
    chosen = [stage for stage in stages if only is None or stage.name in only]
    lacking = [stage for stage in chosen if stage.needs]
    if lacking:
        names = listed((stage.name for stage in lacking), "and")
        stage, need, them = ("stages", "need", "them") if len(lacking) > 1 else ("stage", "needs", "it")
        rest = [each.name for each in chosen if not each.needs] or possible
        raise RecipeError(
            f"train.stages.preset={preset} with its {stage} {names} {need} {lacking[0].needs}, which no source gives "
            f"yet; leave {them} out with only: [{', '.join(rest)}]"
        )
    return chosen


def _check_read(preset: str, stages: Sequence[Mapping[str, Any]], sources: Collection[str]) -> None:
    """Every source that a stage reads is there. Raises RecipeError."""
    for stage in stages:
        mixture = stage["mixture"]
        for name in mixture if isinstance(mixture, dict) else ():
            if name not in sources:
                there = f"data.sources has {listed(sources, 'and')}" if sources else "data.sources is not set"
                raise RecipeError(
                    f"train.stages.preset={preset} reads a source {name} at its stage {stage['name']}, and {there}; "
                    f"define data.sources.{name}, or leave the stage out with train.stages.only"
                )
