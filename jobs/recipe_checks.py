"""What must fit together in a recipe beyond each key's own range. Nothing here writes to disk.

``check`` asks whether a recipe can be trained at all, ``check_run`` whether its run's folder is free or can be gone
on with. Both raise RecipeError. What can be said without torch is said first.
"""

from __future__ import annotations

import math
import os
import re
from inspect import get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from jobs import recipe_yaml
from jobs.entropy_model import with_entropy_model
from jobs.recipe import RESOLVED_RECIPE, WANTED, Recipe, RecipeError
from jobs.recipe_checks_nodes import check_min_workers
from jobs.recipe_checks_stages import (
    check_combination,
    check_frozen,
    check_sources,
    check_stages,
    check_terms,
    check_weights,
)
from jobs.recipe_checks_tasks import check_objective, check_start, check_task_data, check_threshold
from jobs.wording import listed, shown, suggestion

if TYPE_CHECKING:
    from mmada.config import MMaDAConfig

# What may differ when a run goes on: how and how long it runs. All else decides what is learned, or (the
# optimizer's settings) comes back with the optimizer's state, so that a new value would be passed over in silence.
CHANGEABLE_ON_RESUME = {
    "run.name",
    "run.dir",
    "run.resume",
    "model.attn_implementation",
    "train.steps",
    "train.micro_batch",
    "train.zero_stage",
    "train.gradient_checkpointing",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
    "train.evaluate_rows",
    "reward.timeout",
    "reward.retries",
    "reward.batch",
    "ppo.iterations",
    "ppo.micro_batch",
    "ppo.rollout_workers",
    "ppo.rollout_cpus",
    "ppo.rollout_gpus",
    "ppo.rollout_threads",
    "ppo.rollout_slots",
    "ppo.rollout_timeout",
    "ppo.reward_workers",
    "ppo.max_replacements",
    "ppo.max_reward_failures",
    "ppo.max_logprob_gap",
    "ppo.checkpoint_every",
    "ppo.evaluate_every",
    "ppo.table_every",
    "tune.max_concurrent",
}

# The types of the model's fields in words.
TYPE_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list of whole numbers such as [3, 5]",
    list[str]: "a list such as [ssm, attention]",
    dict[str, Any]: "a section such as {rope_type: linear, factor: 2}",
}


def check(recipe: Recipe) -> None:
    """Raise RecipeError unless the sections, the model, the data and this machine go together."""
    check_sources(recipe)
    check_batch(recipe)
    check_schedule(recipe)
    check_objective(recipe)
    check_data(recipe)
    check_stages(recipe)
    if recipe.objectives is not None:
        check_weights("objectives.weights", recipe.objectives.weights)
        check_combination(recipe)
    check_workers(recipe)
    config = checked_config(recipe)
    check_lengths(recipe, config)
    check_experts(recipe, config)
    check_vocabulary(recipe, config)
    check_patches(recipe, config)
    check_threshold(recipe, config)
    check_start(recipe, config)
    check_terms(recipe, config)
    check_frozen(recipe, config)
    check_gpus(recipe)


def check_batch(recipe: Recipe) -> None:
    """Every worker gets the same number of rows, in micro batches of the same size."""
    rows, workers, micro = recipe.train.global_batch, recipe.cluster.workers, recipe.train.micro_batch
    if rows % workers:
        below, above = rows // workers * workers, (rows // workers + 1) * workers
        raise RecipeError(
            f"train.global_batch={rows} is not divisible by cluster.workers={workers}; "
            f"use {f'{below} or {above}' if below else above}"
        )
    if isinstance(micro, int) and recipe.rows_per_worker % micro:
        each = recipe.rows_per_worker
        raise RecipeError(
            f"train.micro_batch={micro} does not divide the {each} rows of a worker "
            f"(train.global_batch={rows} over cluster.workers={workers}); use {listed(divisors(each))}"
        )


def check_schedule(recipe: Recipe) -> None:
    """The warm-up ends before the run does."""
    train = recipe.train
    if train.warmup_steps >= train.steps:
        raise RecipeError(
            f"train.warmup_steps={train.warmup_steps} is not less than train.steps={train.steps}; "
            f"use at most {train.steps - 1}"
        )


def check_data(recipe: Recipe) -> None:
    """A source has the path that it needs and no keys that it would pass over."""
    data = recipe.data
    if data.source == "stdlib":
        for key in ("path", "split", "config_name"):
            if getattr(data, key) is not None:
                raise RecipeError(
                    f"data.{key}={shown(getattr(data, key))} has no meaning for data.source=stdlib; "
                    f"use data.source=files or hub, or leave it out"
                )
    elif data.source in ("tasks", "mixture"):
        check_task_data(recipe)
    elif data.path is None:
        what = "a text, JSONL or Parquet file or a folder of them" if data.source == "files" else "a data set's name"
        raise RecipeError(f"data.path=null gives data.source={data.source} nothing to read; set it to {what}")
    elif data.source == "files" and not Path(data.path).expanduser().exists():
        raise RecipeError(
            f"data.path={data.path} does not exist; give a text, JSONL or Parquet file or a folder of them"
        )
    looks_like_folder = data.tokenizer.startswith((".", "/", "~"))
    if looks_like_folder and not Path(data.tokenizer).expanduser().exists():
        raise RecipeError(
            f"data.tokenizer={data.tokenizer} does not exist; give a tokenizer's folder or name, or bytes"
        )


def check_workers(recipe: Recipe) -> None:
    """ZeRO stage, offload and expert parallelism go with the number of workers."""
    train, cluster = recipe.train, recipe.cluster
    if train.offload_optimizer and train.zero_stage == 0:
        raise RecipeError(
            "train.offload_optimizer=true has nothing to move at train.zero_stage=0; use train.zero_stage=1, 2 or 3"
        )
    check_min_workers(recipe)
    if cluster.expert_parallel == 1:
        return
    if cluster.workers % cluster.expert_parallel:
        raise RecipeError(
            f"cluster.expert_parallel={cluster.expert_parallel} does not divide cluster.workers={cluster.workers}; "
            f"use {listed(divisors(cluster.workers))}"
        )
    if train.zero_stage == 0:
        # DeepSpeed 0.19.8 without ZeRO clips by the mean of the workers' norms (runtime/utils.py, clip_grad_norm_),
        # which is not the gradient's norm where workers hold different experts.
        raise RecipeError(
            f"train.zero_stage=0 does not go with cluster.expert_parallel={cluster.expert_parallel}; "
            f"use train.zero_stage=1, 2 or 3, or cluster.expert_parallel=1"
        )


def checked_config(recipe: Recipe) -> MMaDAConfig:
    """The architecture that the recipe asks for. Raises RecipeError naming ``model.<field>``."""
    from mmada.presets import PRESETS, build_config

    preset, overrides = recipe.model.preset, recipe.model.overrides()
    if preset not in PRESETS:
        raise RecipeError(f"model.preset={shown(preset)} is not a known size; {suggestion(preset, PRESETS)}")
    from mmada.config import MMaDAConfig
    from mmada.config_parts import SECTIONS

    known, types = MMaDAConfig.architecture_fields(), get_annotations(MMaDAConfig, eval_str=True)
    for name, value in overrides.items():
        if name not in known:
            remedy = suggestion(name, sorted(known), "model.")
            raise RecipeError(f"model.{name}={shown(value)} is not a field of the model; {remedy}")
        if name in SECTIONS:
            check_section(name, value)
        elif name in types:
            check_type(name, value, types[name])
    overrides = with_entropy_model(recipe, overrides)
    try:
        return build_config(preset, **overrides)
    except (ValueError, KeyError) as error:  # KeyError: transformers' check of rope_parameters
        raise RecipeError(model_mistake(str(error.args[0]), recipe.model.model_extra or {}, known)) from error


def check_section(name: str, value: Any) -> None:
    """The keys of a section inside the model are there, and have the types that it declares."""
    from mmada.config_parts import SECTIONS

    if not isinstance(value, dict | None):
        raise RecipeError(f"model.{name}={shown(value)} is not {WANTED['model_type']}")
    types = get_annotations(SECTIONS[name], eval_str=True)
    for key, each in (value or {}).items():
        if key not in types:
            remedy = suggestion(key, types, f"model.{name}.")
            raise RecipeError(f"model.{name}.{key}={shown(each)} is not a field of the model; {remedy}")
        check_type(f"{name}.{key}", each, types[key])


def check_type(name: str, value: Any, annotation: Any) -> None:
    """``value`` is what the model config declares for the field, without conversion (a whole number is a float too)."""
    try:
        TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        is_infinite = error.errors()[0]["type"] == "finite_number"
        wanted = WANTED["finite_number"] if is_infinite else type_in_words(annotation)
        kind = wanted.partition(" such as")[0]
        raise RecipeError(f"model.{name}={shown(value)} is not {kind}; write {wanted}") from error


def type_in_words(annotation: Any) -> str:
    """``int | list[int] | None`` as ``a whole number or a list of whole numbers``."""
    kinds = [kind for kind in get_args(annotation) or [annotation] if kind is not type(None)]
    if get_origin(annotation) in (list, dict):
        kinds = [annotation]
    if float in kinds:  # a whole number is a number
        kinds.remove(int)
    return listed(TYPE_WORDS[kind] for kind in kinds)


def model_mistake(reason: str, overrides: dict[str, Any], known: set[str]) -> str:
    """The model config's own finding as a line about ``model.<field>``, with what the recipe sets.

    ``overrides`` are the fields that the recipe sets, ``known`` all there are.
    """
    reason = " ".join(reason.split())
    field = re.split(r"[= .:]", reason, maxsplit=1)[0]
    sets = ", ".join(f"model.{name}={shown(value)}" for name, value in overrides.items())
    if field not in known:
        return f"{sets or 'model'} cannot be built: {reason}; use other values or leave them out"
    return f"model.{reason}" + (f" (this recipe sets {sets})" if sets and field not in overrides else "")


def check_lengths(recipe: Recipe, config: MMaDAConfig) -> None:
    """A row is no longer than the model's positions."""
    longest = config.max_position_embeddings
    lengths = [("train.sequence_length", recipe.train.sequence_length)] + [
        (f"train.stages.{stage.name}.sequence_length", stage.sequence_length)
        for stage in recipe.train.stages or []
        if stage.sequence_length is not None
    ]
    for field, length in lengths:
        if length > longest:
            raise RecipeError(
                f"{field}={length} is more than model.max_position_embeddings={longest}; "
                f"use at most {longest}, or model.max_position_embeddings={length}"
            )


def check_experts(recipe: Recipe, config: MMaDAConfig) -> None:
    """There are experts to split, and they split evenly."""
    parallel = recipe.cluster.expert_parallel
    if parallel == 1:
        return
    if not config.moe_layers:
        raise RecipeError(
            f"cluster.expert_parallel={parallel} has no experts to split (model.num_experts={config.num_experts}, "
            f"no layer of model.mlp_layer_types is moe); use cluster.expert_parallel=1, or a model with experts"
        )
    if config.num_experts % parallel:
        both = divisors(math.gcd(config.num_experts, recipe.cluster.workers))
        raise RecipeError(
            f"model.num_experts={config.num_experts} is not divisible by cluster.expert_parallel={parallel}; use "
            f"cluster.expert_parallel={listed(both)}, or model.num_experts={parallel}, {2 * parallel}, {3 * parallel} …"
        )


def check_vocabulary(recipe: Recipe, config: MMaDAConfig) -> None:
    """The model has a row for every token of the tokenizer."""
    from mmada.data import load_tokenizer

    num_tokens = len(load_tokenizer(recipe.data.tokenizer))
    if config.vocab_size < num_tokens:
        raise RecipeError(
            f"model.vocab_size={config.vocab_size} is less than the {num_tokens} tokens of "
            f"data.tokenizer={recipe.data.tokenizer}; use model.vocab_size={num_tokens} or more"
        )


def check_patches(recipe: Recipe, config: MMaDAConfig) -> None:
    """What is grouped into patches are bytes."""
    from mmada.data import load_tokenizer
    from mmada.tokenizer import ByteTokenizer

    mode = config.patches.mode
    if mode != "none" and not isinstance(load_tokenizer(recipe.data.tokenizer), ByteTokenizer):
        raise RecipeError(
            f"data.tokenizer={recipe.data.tokenizer} makes no bytes for model.patches.mode={mode} to group; "
            "use data.tokenizer=bytes, or model.patches.mode=none"
        )


def check_gpus(recipe: Recipe) -> None:
    """The attention kernel has the GPUs that it needs, and where Ray starts on this machine, they are enough."""
    if recipe.model.attn_implementation == "flex_attention" and not recipe.cluster.gpus_per_worker:
        raise RecipeError(
            "model.attn_implementation=flex_attention has no gradient on CPUs (cluster.gpus_per_worker=0); use sdpa or "
            "blockwise, or cluster.gpus_per_worker=1"
        )
    wanted = recipe.cluster.gpus_per_worker * recipe.cluster.workers
    if recipe.cluster.address is not None or wanted == 0:
        return
    import torch

    if wanted > (found := torch.cuda.device_count()):
        raise RecipeError(
            f"cluster.gpus_per_worker={recipe.cluster.gpus_per_worker} for cluster.workers={recipe.cluster.workers} "
            f"needs {wanted} GPUs and this machine has {found}; use cluster.gpus_per_worker=0, fewer workers, "
            f"or the cluster.address of a larger cluster"
        )


def check_run(recipe: Recipe, fixed: frozenset[str] = frozenset()) -> None:
    """Raise RecipeError unless the run's folder is free, or holds a run that this recipe can go on with.

    ``fixed``: keys that must be as they were, beside those that decide what is learned.
    """
    check_run_dir(recipe)
    folder = recipe.run_dir
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"run.name={recipe.run.name} is a file ({folder}); choose another run.name")
    # A start that was cut short leaves logs and nothing to go on with: such a folder is free.
    begun = any((folder / part).exists() for part in (RESOLVED_RECIPE, "checkpoints", "run.json"))
    used = begun or (folder.is_dir() and any(entry.name != "logs" for entry in folder.iterdir()))
    if not recipe.run.resume:
        if used:
            raise RecipeError(
                f"run.name={recipe.run.name} has been used already ({folder} is not empty); "
                f"go on with it by run.resume=true, or choose another run.name"
            )
        return
    saved = folder / RESOLVED_RECIPE
    if not saved.is_file():
        raise RecipeError(f"run.resume=true finds no run in {folder}; leave it out, or name a run in {recipe.run.dir}")
    check_resumed(recipe, saved, fixed)


def check_run_dir(recipe: Recipe) -> None:
    """``run.dir`` can be written to, or made."""
    parent = recipe.run_dir.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RecipeError(f"run.dir={recipe.run.dir} cannot be written to ({parent}); give another folder")


def check_resumed(recipe: Recipe, saved: Path, fixed: frozenset[str] = frozenset()) -> None:
    """What is learned has not changed since the run began; ``saved`` is its resolved recipe."""
    try:
        before = Recipe.model_validate(recipe_yaml.parse(saved.read_text(encoding="utf-8"))).flattened()
    except ValueError as error:
        raise RecipeError(f"run.resume=true cannot read {saved}; restore it, or choose another run.name") from error
    now = recipe.flattened()
    if before["train.zero_stage"] == 0 and now["train.zero_stage"] != 0:
        raise RecipeError(
            f"train.zero_stage={now['train.zero_stage']} cannot take up checkpoints of ZeRO stage 0; "
            "use train.zero_stage=0 as then, or choose another run.name"
        )
    changeable = CHANGEABLE_ON_RESUME - fixed
    for key in sorted(before.keys() | now.keys()):
        if key in changeable or key.startswith(("cluster.", "tracking.")) or before.get(key) == now.get(key):
            continue
        if key not in before:
            remedy = f"{key} was not set then: leave it out, or choose another run.name"
        elif isinstance(before[key], list | dict):  # of several lines
            remedy = f"use that of {saved}, or choose another run.name"
        else:
            remedy = f"use {key}={before[key]} as then, or choose another run.name"
        raise RecipeError(f"{key}={shown(now.get(key))} is not what run.name={recipe.run.name} began with; {remedy}")


def divisors(number: int) -> list[int]:
    """All whole numbers that divide ``number``, smallest first."""
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})
