"""``mmada plan``: what a recipe needs, before anything is queued.

``make_plan`` computes, ``jobs.plan_report`` shows, ``run`` joins them to this machine or the recipe's cluster.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.activations import BYTES, Activations, activation_memory
from jobs.micro_batch import candidates, usable, with_micro_batch
from jobs.recipe import Recipe, RecipeError
from jobs.recipe_schema import AUTO, TrainSection
from jobs.stages import stages_of

if TYPE_CHECKING:
    from jobs.recipe_checks_tune import Search
    from mmada.config import MMaDAConfig

# Elements of the buffer in which DeepSpeed gathers gradients before it reduces them, by ZeRO stage:
# what cluster.engine sets.
REDUCE_BUCKET = {0: 0, 1: 50_000_000, 2: 50_000_000, 3: 50_000_000}
# Parameters that ZeRO 3 keeps gathered at a time at most (stage3_max_live_parameters).
MAX_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters: in all, used by one token, inside the experts of all layers together, and not trained."""

    total: int
    active: int
    experts: int
    frozen: int = 0


@dataclass(frozen=True)
class Machine:
    """What there is to run on. ``memory`` and ``gpu_memory`` are bytes, of all nodes and of one GPU.

    ``nodes``: a cluster's, as ``ray.nodes()`` says them; None for this machine.
    """

    where: str
    cpus: float
    gpus: float
    memory: int
    gpu_memory: int | None = None
    nodes: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class StageMemory:
    """Bytes that one worker holds at one ZeRO stage."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    buffers: int

    @property
    def states(self) -> int:
        """Everything that stays over a step."""
        return self.parameters + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class BatchArithmetic:
    """How the global batch is made up. ``epochs`` is None where the data has not been prepared yet."""

    global_batch: int
    workers: int
    micro_batch: int
    accumulation: int
    tokens_per_step: int
    tokens_in_run: int
    epochs: float | None


@dataclass(frozen=True)
class SearchPlan:
    """What ``mmada tune`` would do: ``trials`` of ``steps`` at most, ``at_once`` at a time. ``how``: drawn by what."""

    trials: int
    at_once: int
    steps: int
    how: str
    goal: str


@dataclass(frozen=True)
class Plan:
    """All that ``mmada plan`` shows. ``is_estimated``: the micro batch is what a recipe's ``auto`` may come to.

    With a ``search`` all but its own numbers are those of one trial.
    """

    recipe: Recipe
    size: ModelSize
    stages: tuple[StageMemory, ...]
    activations: Activations
    batch: BatchArithmetic
    machine: Machine
    engine: tuple[str, ...]
    warnings: tuple[str, ...]
    is_estimated: bool = False
    search: SearchPlan | None = None

    @property
    def kept_activations(self) -> int:
        """Bytes of activations with this recipe's choice of gradient checkpointing."""
        return self.activations.checkpointed if self.recipe.train.gradient_checkpointing else self.activations.full

    def device_bytes(self, row: StageMemory) -> int:
        """What one worker's device holds at a stage; offloaded optimizer states are elsewhere if it is a GPU."""
        away = row.optimizer if self.recipe.train.offload_optimizer and self.recipe.cluster.gpus_per_worker else 0
        return row.states - away + self.kept_activations

    @property
    def worker_bytes(self) -> int:
        """What one worker's device holds with this recipe."""
        return self.device_bytes(self.stages[self.recipe.train.zero_stage])

    @property
    def room_per_worker(self) -> int:
        """Bytes for one worker: a GPU's memory or an even share of the machines', or less where the recipe says so."""
        cluster, at_once = self.recipe.cluster, 1 if self.search is None else self.search.at_once
        room = self.machine.memory // (cluster.workers * at_once)
        if cluster.gpus_per_worker and self.machine.gpu_memory is not None:
            room = self.machine.gpu_memory
        return room if cluster.memory_per_worker is None else min(room, int(cluster.memory_per_worker * 2**30))


def run(recipe: Recipe, address: str | None = None, search: Search | None = None) -> int:
    """Print the plan of a recipe, for the cluster whose dashboard is at ``address`` where that is given.

    With a ``search`` it is the plan of one of its trials, and says how many run at a time.

    Raises RecipeError for one that cannot be trained, ClusterError for no cluster or one without room.
    """
    if address is not None:
        from jobs.submission.planning import run_at

        return run_at(recipe, address, search)
    from jobs.plan_report import show
    from jobs.prepared_data import find_prepared
    from jobs.recipe_checks import check, check_run, checked_config

    check(recipe)
    config = checked_config(recipe)
    prepared = find_prepared(recipe)
    tokens = prepared.train.num_tokens if prepared else None
    if recipe.train.objective == "language_model" and recipe.data.source == "tasks" and recipe.tasks is not None:
        tokens = recipe.tasks.size * recipe.train.sequence_length  # a problem fills a row, with padding
    warnings = []
    try:
        check_run(recipe)
    except RecipeError as error:
        warnings.append(f"mmada train would refuse: {error}")
    show(make_plan(recipe, config, model_size(config), find_machine(recipe), tokens, warnings, search))
    return 0


def make_plan(
    recipe: Recipe,
    config: MMaDAConfig,
    size: ModelSize,
    machine: Machine,
    train_tokens: int | None,
    warnings: list[str] | None = None,
    search: Search | None = None,
) -> Plan:
    """The plan of a checked recipe; computes only. ``train_tokens``: tokens in the training text, where known."""
    is_estimated = recipe.train.micro_batch == AUTO
    if is_estimated:
        recipe = with_micro_batch(recipe, estimated_micro_batch(recipe, config, size, machine, search))
    plan = Plan(
        recipe=recipe,
        size=size,
        stages=tuple(stage_memory(recipe, size, stage) for stage in range(4)),
        activations=activation_memory(recipe, config),
        batch=batch_arithmetic(recipe, train_tokens),
        machine=machine,
        engine=engine_words(recipe, config),
        warnings=(),
        is_estimated=is_estimated,
        search=None if search is None else search_plan(search, machine),
    )
    return replace(plan, warnings=(*(warnings or ()), *doubts(plan)))


def search_plan(search: Search, machine: Machine) -> SearchPlan:
    """How a search goes on this machine. Raises RecipeError for more trials at a time than a cluster has room for."""
    from jobs.tuning.room import trials_at_once

    at_once, goal = trials_at_once(search, machine.nodes), f"the {search.extreme} {search.metric}"
    return SearchPlan(search.trials, at_once, search.most_steps, search.settings.how, goal)


def estimated_micro_batch(
    recipe: Recipe, config: MMaDAConfig, size: ModelSize, machine: Machine, search: Search | None = None
) -> int:
    """The largest micro batch that by this arithmetic fits at the longest rows of any stage; 1 where none does."""
    longest = {"micro_batch": 1, "sequence_length": max(stage.sequence_length for stage in stages_of(recipe, []))}
    one_row = recipe.model_copy(update={"train": recipe.train.model_copy(update=longest)})
    plan = make_plan(one_row, config, size, machine, None, search=search)
    room = usable(plan.room_per_worker) - (plan.worker_bytes - plan.kept_activations)
    return max((rows for rows in candidates(recipe) if rows * plan.kept_activations <= room), default=1)


def stage_memory(recipe: Recipe, size: ModelSize, stage: int) -> StageMemory:
    """Bytes per worker at a ZeRO stage (arXiv:1910.02054, section 3.1 and figure 1).

    Per parameter: 4 bytes and a gradient of 4 in fp32, 2 and 2 in bf16. Optimizer states are AdamW's two moments (8)
    and a 32-bit copy of the weights (4); without ZeRO, fp32 needs no copy, while from stage 1 on DeepSpeed 0.19.8
    copies its partition in fp32 too (runtime/zero/stage_1_and_2.py, single_partition_of_fp32_groups). Stage 1 splits
    the states over the workers, 2 the gradients too, 3 the parameters too. A worker holds 1/expert_parallel of the
    experts, and what belongs to those is split over the workers that hold the same ones: workers/expert_parallel.
    Frozen parameters have neither gradients nor optimizer states.
    """
    width = BYTES[recipe.train.precision]
    per_state = 8 if stage == 0 and recipe.train.precision == "fp32" else 12
    workers, parallel = recipe.cluster.workers, recipe.cluster.expert_parallel
    dense, experts = size.total - size.experts, size.experts / parallel
    whole = dense + experts
    part = dense / workers + experts / (workers / parallel)
    trained, trained_part = whole - size.frozen, part - size.frozen / workers
    bucket = REDUCE_BUCKET[stage] if recipe.cluster.gpus_per_worker else min(REDUCE_BUCKET[stage], trained)
    gathered = min(MAX_LIVE_PARAMETERS, whole) if stage == 3 else 0
    return StageMemory(
        stage=stage,
        parameters=round(width * (part if stage == 3 else whole)),
        gradients=round(width * (trained_part if stage >= 2 else trained)),
        optimizer=round(per_state * (trained_part if stage >= 1 else trained)),
        buffers=round(width * (bucket + gathered)),
    )


def batch_arithmetic(recipe: Recipe, train_tokens: int | None) -> BatchArithmetic:
    """global batch = workers x micro batch x accumulation, and what it comes to over the run."""
    per_step = recipe.train.global_batch * recipe.train.sequence_length * recipe.sequences_per_row
    stages = [(stage.plan.steps, stage.global_batch * stage.sequence_length) for stage in stages_of(recipe, [])]
    in_run = sum(steps * tokens for steps, tokens in stages) * recipe.sequences_per_row
    return BatchArithmetic(
        global_batch=recipe.train.global_batch,
        workers=recipe.cluster.workers,
        micro_batch=recipe.micro_batch,
        accumulation=recipe.accumulation,
        tokens_per_step=per_step,
        tokens_in_run=in_run,
        epochs=in_run / train_tokens if train_tokens else None,
    )


def engine_words(recipe: Recipe, config: MMaDAConfig) -> tuple[str, ...]:
    """What DeepSpeed is asked to do, in words."""
    train, workers, parallel = recipe.train, recipe.cluster.workers, recipe.cluster.expert_parallel
    split = (
        "nothing",
        "optimizer states",
        "optimizer states and gradients",
        "optimizer states, gradients and parameters",
    )
    words = [
        f"ZeRO {train.zero_stage}: {split[train.zero_stage]} split over {workers} worker{'s' * (workers > 1)}",
        "fp32 throughout"
        if train.precision == "fp32"
        else "bf16 weights and gradients, a 32-bit copy of the weights in the optimizer",
        f"AdamW, weight decay {train.weight_decay:g}; "
        + (f"gradients clipped at norm {train.clip_grad_norm:g}" if train.clip_grad_norm else "gradients not clipped"),
        f"learning rate {train.learning_rate:g} after {train.warmup_steps} steps of warm-up, then "
        f"{schedule_words(train)}",
    ]
    if parallel > 1:
        words.append(
            f"AutoEP: {config.num_experts // parallel} of {config.num_experts} experts on each worker, "
            f"{workers // parallel} cop{'ies' if workers > parallel else 'y'} of each"
        )
    elif config.moe_layers:
        words.append(f"all {config.num_experts} experts on every worker")
    if train.offload_optimizer:
        words.append("optimizer states in the host's memory")
    if train.gradient_checkpointing:
        words.append("blocks computed anew in the backward pass")
    return tuple(words)


def schedule_words(train: TrainSection) -> str:
    """What the learning rate does behind the warm-up."""
    lowest = f"{train.learning_rate * train.min_learning_rate_ratio:g}"
    return {
        "cosine": f"a cosine to {lowest}",
        "linear": f"a straight line to {lowest}",
        "constant": "constant",
        "wsd": f"constant, and over the last {train.decay_steps} steps down to {lowest}",
        "inverse_sqrt": f"one over the root of the steps, {lowest} at least",
        "adaptive": f"lower whenever evaluations no longer become better, to {lowest} at least",
    }[train.schedule]


def doubts(plan: Plan) -> tuple[str, ...]:
    """What is allowed but probably not meant."""
    train, cluster, machine = plan.recipe.train, plan.recipe.cluster, plan.machine
    found = []
    if train.precision == "bf16" and not cluster.gpus_per_worker:
        found.append("train.precision=bf16 without a GPU: many CPUs compute it slowly; fp32 is the safe choice there")
    if train.offload_optimizer and not cluster.gpus_per_worker:
        found.append("train.offload_optimizer=true without a GPU moves nothing: the states are in host memory anyway")
    if not cluster.gpus_per_worker and machine.gpus:
        found.append(f"{machine.gpus:g} GPU(s) stay idle; cluster.gpus_per_worker=1 uses one for each worker")
    if cluster.address is None and cluster.workers * cluster.cpus_per_worker > machine.cpus:
        found.append(
            f"cluster.workers={cluster.workers} want {cluster.workers * cluster.cpus_per_worker:g} CPUs and there are "
            f"{machine.cpus:g}: they will share them"
        )
    if plan.worker_bytes > plan.room_per_worker:
        found.append(
            f"a worker needs {gib(plan.worker_bytes)} and has {gib(plan.room_per_worker)}: try a higher "
            f"train.zero_stage, a smaller train.micro_batch, train.gradient_checkpointing=true or more workers"
        )
    if train.zero_stage == 3 and plan.size.total < 10_000_000:
        found.append("train.zero_stage=3 gathers every layer anew; for a model this small it only costs time")
    return tuple(found)


def model_size(config: MMaDAConfig) -> ModelSize:
    """Count the parameters on the meta device."""
    from mmada.config import MMaDAConfig
    from mmada.model import count_parameters

    total, active = count_parameters(config)
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size  # gate, up and down, without biases
    experts = per_expert * config.num_experts * len(config.moe_layers)
    patches = config.patches
    frozen = count_parameters(MMaDAConfig(**patches.entropy_model))[0] if patches.needs_entropy_model else 0
    return ModelSize(total, active, experts, frozen)


def find_machine(recipe: Recipe) -> Machine:
    """This machine, or the cluster at ``cluster.address``. Raises ClusterError if that does not answer."""
    import os

    import psutil
    import torch

    cluster = recipe.cluster
    if cluster.address is None:
        gpus = torch.cuda.device_count()
        gpu_memory = torch.cuda.get_device_properties(0).total_memory if gpus else None
        return Machine("this machine", os.cpu_count() or 1, gpus, psutil.virtual_memory().total, gpu_memory)
    import ray

    from cluster.session import RaySession

    with (
        tempfile.TemporaryDirectory() as logs,
        RaySession(
            cluster.address,
            workers=cluster.workers,
            cpus_per_worker=cluster.cpus_per_worker,
            gpus_per_worker=cluster.gpus_per_worker,
            log_dir=Path(logs),
            timeout_s=cluster.start_timeout,
        ),
    ):
        found = ray.cluster_resources()
        nodes = ray.nodes()
        where = f"Ray at {cluster.address}, {sum(node['Alive'] for node in nodes)} node(s)"
    return Machine(where, found.get("CPU", 0), found.get("GPU", 0), int(found.get("memory", 0)), nodes=nodes)


def gib(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
