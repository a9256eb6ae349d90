"""The parts of a recipe that make a run of several stages: named sources, stages, and the objectives' weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from jobs.recipe_schema_rl import Name, Positive, Section, TasksSection

Ratio = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class SourceSection(Section):
    """One of several things to learn from, under ``data.sources``; keys as in ``data``, which they stand in for."""

    source: Literal["stdlib", "files", "hub", "tasks"]
    """As ``data.source``."""

    path: Name | None = None
    """As ``data.path``."""

    text_field: Name = "text"
    """As ``data.text_field``."""

    split: str | None = None
    """As ``data.split``."""

    config_name: str | None = None
    """As ``data.config_name``."""

    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """As ``data.held_out``."""

    limit_documents: Annotated[int, Field(ge=2)] | None = None
    """As ``data.limit_documents``."""

    tasks: TasksSection | None = None
    """The problems of ``source: tasks``."""

    difficulty: Literal["level", "length", "compression", "loss"] | None = None
    """How rows compare: by the level of their task (``tasks.difficulty`` as a list), their length in tokens, how badly
    they compress, or their loss under ``difficulty_model``; null: all alike, and always open."""

    difficulty_model: Name | None = None
    """A small trained model for ``difficulty: loss``: a run's folder, a checkpoint or a saved model."""


class PacingSection(Section):
    """How much of a stage's range of difficulty is open: the easiest rows at first, in the end all."""

    kind: Literal["linear", "root", "source", "gated"]
    """``linear`` and ``root`` (competence) rise with the steps; ``source``: the straight line times how well the model
    does, clipped; ``gated``: a step up whenever ``metric`` passes ``threshold``."""

    start: Ratio = 0.0
    """Share that is open at the stage's first step."""

    over: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the stage's steps after which all is open (``linear``, ``root``, ``source``)."""

    metric: Name | None = None
    """What evaluations measure (``source``, ``gated``)."""

    threshold: Annotated[float, Field(gt=0)] = 1.0
    """What the metric must reach (``gated``), or what counts as doing well (``source``)."""

    times: Positive = 1
    """Evaluations running that must pass (``gated``)."""

    rise: Annotated[float, Field(gt=0, le=1)] = 0.25
    """By how much more opens then (``gated``)."""

    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the running mean of past performance (``source``)."""

    ratchet: bool = True
    """What has been opened stays open (``source``)."""


class AdvanceSection(Section):
    """What ends a stage before its last step."""

    when: Literal["threshold", "plateau"]
    """``threshold``: ``metric`` passes ``threshold``; ``plateau``: it no longer becomes better."""

    metric: Name
    """What evaluations measure."""

    threshold: float | None = None
    """What it must reach, from above where lower is better (``threshold``)."""

    times: Positive = 2
    """Evaluations running that must pass, or that may pass without becoming better."""

    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """By how much it must become better to count (``plateau``)."""


class StageSection(Section):
    """One stage of a run. Keys left out are those of ``train``, or as they were for the whole run."""

    name: Name
    """Shown beside the metrics, and in MLflow."""

    steps: Positive | None = None
    """Optimizer steps at most; or give ``tokens``."""

    tokens: Positive | None = None
    """Tokens at most, padding counted: rows of ``sequence_length`` in whole batches."""

    mixture: dict[str, Weight] | None = None
    """Weights of the sources by name; null: all alike. A source that is not named is not read."""

    sequence_length: Annotated[int, Field(ge=2)] | None = None
    """Instead of ``train.sequence_length``."""

    global_batch: Positive | None = None
    """Instead of ``train.global_batch``."""

    difficulty: Annotated[list[Ratio], Field(min_length=2, max_length=2)] = [0.0, 1.0]
    """From which row to which, as shares of a source's rows in order of difficulty."""

    pacing: PacingSection | None = None
    """How this range opens; null: at once."""

    loss_weights: dict[str, Weight | Annotated[list[Weight], Field(min_length=2, max_length=2)]] = {}
    """Instead of ``objectives.weights``, by name; ``[from, to]`` goes in a straight line over the stage."""

    frozen: list[Name] = []
    """Parts that do not learn: names of parts (``router``, ``memory``, ``gates``, ``embeddings`` …) or patterns of
    parameter names such as ``model.layers.0.*``. Their optimizer state waits for them."""

    learning_rate_factor: Annotated[float, Field(gt=0)] = 1.0
    """What the learning rate is multiplied with."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the stage's learning rate rises in a straight line."""

    advance: AdvanceSection | None = None
    """What ends it early; null: nothing."""


class StagePresetSection(Section):
    """``train.stages`` as a named curriculum, which becomes a list of stages when the recipe is read."""

    preset: Name
    """``reasoning``: core, multi-hop, causal, multimodal; ``features``: foundation, enhanced, metacognition;
    ``multimodal``: text, alignment, multimodal. ``jobs/stage_presets.py`` has their lengths and settings."""

    factor: float = 1.0
    """What the lengths of all its stages are multiplied with, more than 0."""

    only: list[Name] | None = None
    """Those of its stages that are run, in the preset's order; null: all."""

    changes: dict[str, dict[str, Any]] = {}
    """Keys of stages by name, instead of or beside the preset's own: ``{core: {sequence_length: 96}}``."""


class ObjectivesSection(Section):
    """What is minimised beside the objective itself, and how it is weighed."""

    weights: dict[str, Weight] = {}
    """By name: ``calibration``, ``compute``, ``safety``, and ``language_model`` itself (1 unless said)."""

    combine: Literal["fixed", "uncertainty", "gradnorm", "project"] = "fixed"
    """``fixed``: as they are; ``uncertainty``: learned (Kendall et al.); ``gradnorm``: so that gradients are alike;
    ``project``: parts of gradients that run against others are taken away (PCGrad)."""

    combine_rate: Annotated[float, Field(gt=0)] = 0.025
    """How fast ``uncertainty`` and ``gradnorm`` learn."""

    gradnorm_alpha: Annotated[float, Field(ge=0)] = 1.5
    """How strongly losses that fall slowly are favoured (``gradnorm``)."""

    gradients_every: Annotated[int, Field(ge=0)] = 0
    """Steps between measurements of every loss's gradient norm, a metric; 0: only where ``combine`` asks for them."""

    calibration: Literal["soft_bins", "mmce", "brier"] = "soft_bins"
    """Which loss ``calibration`` is; the hard calibration error is reported with each."""

    compute_target: Annotated[float, Field(ge=0)] = 0.0
    """Share of the cost of the most expensive way through the gates from which on ``compute`` costs."""

    compute_cost: Literal["operations", "seconds"] = "operations"
    """What a way through a gate costs: the operations that it takes, or its time, measured when ``compute`` first has a
    weight and then kept for the whole run."""

    time_target: Annotated[float, Field(ge=0)] | None = None
    """Seconds of a forward pass above which the time itself would cost. Time has no gradient, so this is a metric of
    ``compute`` and no loss; null: not measured."""

    safety_reference: Name | None = None
    """The model that ``safety`` stays near: a run's folder, a checkpoint or a saved model."""

    safety_limit: Annotated[float, Field(ge=0)] | None = None
    """Nats per token that the divergence may reach; its price then follows by itself, a Lagrange multiplier. null: the
    price is the weight."""

    safety_rate: Annotated[float, Field(gt=0)] = 0.05
    """How fast the multiplier follows."""
