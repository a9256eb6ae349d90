"""Is there room on a cluster that is somewhere else? Asked before anything is queued."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cluster.places import Demand, room, total
from cluster.ray_jobs import RayJobs
from jobs.plan import Machine
from jobs.recipe import Recipe


def demand_of(recipe: Recipe) -> Demand:
    """What a run of the recipe takes: its workers and, with a section ``ppo``, the rollout actors beside them."""
    cluster, ppo = recipe.cluster, recipe.ppo
    beside = (ppo.rollout_workers, ppo.rollout_cpus, ppo.rollout_gpus) if ppo is not None else (0, 0.0, 0.0)
    num_actors, cpus, gpus = beside
    return Demand(
        cluster.workers,
        cluster.cpus_per_worker,
        cluster.gpus_per_worker,
        extra_cpus=num_actors * cpus,
        extra_gpus=num_actors * gpus,
        extra_actors=max(num_actors, 1),
    )


def check_room(recipe: Recipe, nodes: list[dict], jobs: RayJobs) -> str:
    """What the run takes of what is there, in words. Raises ClusterError for a run that does not fit.

    With ``cluster.queue_timeout`` the job waits for room, and is not refused.
    """
    demand = demand_of(recipe)
    there = f"{room(nodes)} at {jobs.address}"
    wanted = f"{demand.workers} worker{'s' * (demand.workers != 1)} of {demand.each}"
    wanted += f" and {demand.extra} beside them" if demand.extra else ""
    if demand.fits(nodes):
        return f"{there}: room for {wanted}"
    if recipe.cluster.queue_timeout > 0:
        return f"{there}: the job will wait up to {recipe.cluster.queue_timeout:g} s for {wanted}"
    try:
        demand.require(nodes)
    except Exception as error:
        error.args = (f"{error}, or wait for nodes with cluster.queue_timeout=600",)
        raise
    raise AssertionError("a demand that does not fit is refused")


def machine_at(jobs: RayJobs, nodes: list[dict]) -> Machine:
    """The cluster as ``mmada plan`` shows it."""
    alive = sum(node["Alive"] for node in nodes)
    return Machine(
        f"Ray at {jobs.address}, {alive} node(s)",
        total(nodes, "CPU"),
        total(nodes, "GPU"),
        int(total(nodes, "memory")),
        jobs.gpu_memory(),
        nodes,
    )


def files_elsewhere(recipe: Recipe) -> list[str]:
    """Keys of files that the recipe names and that are not on this machine, as ``key=value``: the cluster's, then."""
    return [f"{key}={name}" for key, name in _files(recipe) if not Path(name).expanduser().exists()]


def relative_files(recipe: Recipe) -> list[tuple[str, str]]:
    """Keys of files that the recipe names by a relative path."""
    return [(key, name) for key, name in _files(recipe) if not Path(name).expanduser().is_absolute()]


def _files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    data, ppo, objectives = recipe.data, recipe.ppo, recipe.objectives
    named: list[tuple[str, str | None]] = [
        ("data.path", data.path if data.source == "files" else None),
        ("data.tokenizer", data.tokenizer if data.tokenizer.startswith((".", "/", "~")) else None),
        ("model.entropy_model", recipe.model.entropy_model),
        ("train.start_from", recipe.train.start_from),
        ("ppo.start_from", ppo.start_from if ppo is not None else None),
        ("objectives.safety_reference", objectives.safety_reference if objectives is not None else None),
    ]
    for name, source in (data.sources or {}).items():
        named.append((f"data.sources.{name}.path", source.path if source.source == "files" else None))
        named.append((f"data.sources.{name}.difficulty_model", source.difficulty_model))
    for number, part in enumerate(recipe.reward.parts if recipe.reward is not None else ()):
        named.append((f"reward.parts.{number}.name", part.name if part.kind == "model" else None))
    yield from ((key, name) for key, name in named if name is not None)
