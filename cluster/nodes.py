"""Which nodes a cluster has, which of them answer, and how many workers there is room for."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.places import places

_PROBES = 32  # nodes asked at a time


@dataclass(frozen=True)
class Survey:
    """The nodes that Ray takes for alive. Names are addresses, by Ray's own ids.

    ``silent``: those that do not answer; Ray itself notices that a node is gone only after some seconds, and would
    until then place workers there. ``rooms``: what is free on those that do, as ``places`` takes it.
    """

    answering: dict[str, str]
    silent: dict[str, str]
    rooms: Sequence[dict[str, Any]]

    def room(self, cpus_per_worker: float, gpus_per_worker: float) -> int:
        """How many workers find a place on the nodes that answer."""
        return places([*self.rooms], cpus_per_worker, gpus_per_worker)


def survey(timeout_s: float = 2.0) -> Survey:
    """Look at the cluster that this process has joined; a node has so many seconds to answer."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    free = available_resources_per_node()
    with ThreadPoolExecutor(min(_PROBES, max(1, len(alive)))) as pool:
        answers = [*pool.map(lambda node: _answers(node, timeout_s), alive)]
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in alive}
    answering = {node["NodeID"] for node, answer in zip(alive, answers, strict=True) if answer}
    return Survey(
        answering={node: name for node, name in names.items() if node in answering},
        silent={node: name for node, name in names.items() if node not in answering},
        rooms=[{"Alive": True, "Resources": free.get(node, {})} for node in answering],
    )


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For an actor that a run stands and falls with: it shares the fate of the driver and of no other node."""
    return NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)


def _answers(node: dict[str, Any], timeout_s: float) -> bool:
    """Whether somebody listens at the port under which nodes of a cluster reach each other."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=timeout_s).close()
    except OSError:
        return False
    return True
