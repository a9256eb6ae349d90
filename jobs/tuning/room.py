"""Room for trials: how many run at a time on this machine or a cluster, and waiting for one trial's places."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from cluster.nodes import survey
from cluster.places import places, total
from jobs.recipe import Recipe, RecipeError
from jobs.recipe_checks_tune import Search
from jobs.shrinking import possible_workers

_LOOK_EVERY_S = 0.5


def trials_at_once(search: Search, nodes: list[dict[str, Any]] | None) -> int:
    """As many as ``tune.max_concurrent`` says, or as there is room for; at least one, at most all.

    ``nodes``: a cluster's, as ``ray.nodes()`` says them, or None for Ray that is started here and shares the cores out
    to whatever it is asked for. Raises RecipeError for more than a cluster has room for.
    """
    asked, verb = search.settings.max_concurrent, search.settings.verb
    found = room_here(search.recipe, verb) if nodes is None else room_on(nodes, search.recipe, verb)
    waits = search.recipe.cluster.queue_timeout > 0  # the session does, for as many as are asked for
    if nodes is not None and asked is not None and asked > found and not waits:
        raise RecipeError(
            f"tune.max_concurrent={asked} trials at a time do not fit into the cluster, which has room for {found}; "
            f"use tune.max_concurrent={found}, add nodes, or wait for them with cluster.queue_timeout=600"
        )
    return min(asked or found, search.trials)


def room_here(recipe: Recipe, verb: str) -> int:
    """Trials that this machine has cores, and GPUs, for."""
    cluster, ppo = recipe.cluster, recipe.ppo if verb == "ppo" else None
    workers = cluster.workers + (ppo.rollout_workers if ppo else 0)
    found = (os.cpu_count() or 1) // (workers * (cluster.threads_per_worker or 1))
    gpus = cluster.workers * cluster.gpus_per_worker + (ppo.rollout_workers * ppo.rollout_gpus if ppo else 0)
    if gpus:
        import torch

        found = min(found, int(torch.cuda.device_count() // gpus))
    return max(1, found)


def room_on(nodes: list[dict[str, Any]], recipe: Recipe, verb: str) -> int:
    """Trials whose workers, and rollout actors, fit on these nodes."""
    own, ppo = recipe.cluster, recipe.ppo
    found = [places(nodes, own.cpus_per_worker, own.gpus_per_worker) // own.workers]
    if verb == "ppo" and ppo is not None:
        # Where the actors go is for Ray's scheduler: theirs is counted as a whole.
        each = {
            "CPU": own.workers * own.cpus_per_worker + ppo.rollout_workers * ppo.rollout_cpus,
            "GPU": own.workers * own.gpus_per_worker + ppo.rollout_workers * ppo.rollout_gpus,
        }
        found += [int(total(nodes, kind) // wanted) for kind, wanted in each.items() if wanted]
    return max(1, min(found))


def wait_for_room(recipe: Recipe, resized: Callable[[Recipe, int], Recipe], stop: threading.Event) -> int:
    """Wait until all workers of a trial find places on the cluster that was joined; how many to start with.

    They are fewer where a node was lost, another has not come within ``cluster.node_timeout``, and ``resized`` gives a
    recipe for them. A trial whose places others have waits for as long as that takes, or until ``stop`` is set.
    """
    cluster = recipe.cluster
    each = cluster.cpus_per_worker, cluster.gpus_per_worker
    sizes = possible_workers(recipe, resized)
    began = time.monotonic()
    while not stop.is_set():
        free, there = survey().room(*each), places(ray.nodes(), *each)
        if free >= cluster.workers:
            break
        if there < cluster.workers and time.monotonic() - began > cluster.node_timeout:
            if fitting := [size for size in sizes if size <= free]:
                return max(fitting)
            if there < min(sizes):
                break  # the session says what is missing
        time.sleep(_LOOK_EVERY_S)
    return cluster.workers
