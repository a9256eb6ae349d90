"""Room for a run: what its workers and the actors beside them take, and whether a cluster has it, or will have it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from ray.util.placement_group import placement_group, remove_placement_group

from cluster.errors import ClusterError

_TICK_S = 0.5


@dataclass(frozen=True)
class Demand:
    """What must find room, in Ray's logical units.

    ``workers`` processes with ``cpus_per_worker`` and ``gpus_per_worker`` each, every one on one node; beside them
    ``extra_actors`` actors that share ``extra_cpus`` and ``extra_gpus`` evenly.
    """

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    extra_cpus: float = 0.0
    extra_gpus: float = 0.0
    extra_actors: int = 1

    @property
    def each(self) -> str:
        """One worker in words."""
        return f"{self.cpus_per_worker:g} CPU" + (f" and {self.gpus_per_worker:g} GPU" * bool(self.gpus_per_worker))

    @property
    def extra(self) -> str:
        """The actors beside the workers in words; empty without them."""
        shares = {"CPU": self.extra_cpus, "GPU": self.extra_gpus}
        return " and ".join(f"{count:g} {kind}" for kind, count in shares.items() if count)

    def fits(self, nodes: list[dict]) -> bool:
        """Whether ``nodes``, as ray.nodes() says them, have the room, free or not."""
        if places(nodes, self.cpus_per_worker, self.gpus_per_worker) < self.workers:
            return False
        # What is left over is counted as a whole: how it is cut up among the nodes is for Ray's scheduler.
        cpus = total(nodes, "CPU") - self.workers * self.cpus_per_worker
        gpus = total(nodes, "GPU") - self.workers * self.gpus_per_worker
        return cpus >= self.extra_cpus - 1e-6 and gpus >= self.extra_gpus - 1e-6

    def require(self, nodes: list[dict]) -> None:
        """Raise ClusterError unless it fits."""
        if self.fits(nodes):
            return
        there = room(nodes)
        found = places(nodes, self.cpus_per_worker, self.gpus_per_worker)
        if found >= self.workers:
            raise ClusterError(
                f"cluster.workers={self.workers} workers of {self.each} and the actors beside them, {self.extra} in "
                f"all, do not fit: there are {there}; use fewer actors, add nodes, or ask for less for each"
            )
        remedy = f"use cluster.workers={found} or " if found else ""
        raise ClusterError(
            f"cluster.workers={self.workers} workers of {self.each} do not fit: there is room for {found} ({there}); "
            f"{remedy}add nodes, or ask for less for each worker"
        )

    def bundles(self) -> list[dict[str, float]]:
        """What Ray's scheduler and an autoscaler are asked for: a bundle for each process."""
        worker = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        actor = {"CPU": self.extra_cpus / self.extra_actors, "GPU": self.extra_gpus / self.extra_actors}
        wanted = [worker] * self.workers + [actor] * self.extra_actors
        positive = [{kind: count for kind, count in bundle.items() if count} for bundle in wanted]
        return [bundle for bundle in positive if bundle]

    def wait(self, timeout_s: float, nodes: Callable[[], list[dict]], on_wait: Callable[[str], None]) -> None:
        """Wait for as much free room, which an autoscaler brings or other runs give back.

        The cluster is asked by a placement group, which counts beside those of other runs and ends with this
        process (``ray.autoscaler.sdk.request_resources`` would replace what others ask for, and outlive the run). It
        is removed as soon as it is there, for the workers to take its place.

        Args:
            timeout_s: seconds after which there is no more waiting.
            nodes: gives what ray.nodes() says.
            on_wait: is told in words what is waited for, each time that this has changed.

        Raises:
            ClusterError: the room has not been found in time.
        """
        if not (bundles := self.bundles()):
            return
        group = placement_group(bundles)
        said, deadline = "", time.monotonic() + timeout_s
        wanted = f"{self.workers} worker{'s' * (self.workers != 1)} of {self.each}"
        wanted += f" and {self.extra} beside them" if self.extra else ""
        try:
            while not group.wait(_TICK_S):
                there = room(nodes())
                if time.monotonic() >= deadline:
                    raise ClusterError(
                        f"cluster.queue_timeout={timeout_s:g} s have passed without room for {wanted}: there are "
                        f"{there}, some of it perhaps in use ('ray status' on the head says so, and what the "
                        "autoscaler does about it); wait longer, or ask for less"
                    )
                if there != said:
                    on_wait(f"waiting for room for {wanted}: so far there are {there} …")
                    said = there
        finally:
            remove_placement_group(group)


def places(nodes: list[dict], cpus_per_worker: float, gpus_per_worker: float) -> int:
    """How many workers fit, given that each needs its CPUs and GPUs on one node. `nodes` is what ray.nodes() says."""
    fitting = 0
    for node in nodes:
        if not node["Alive"]:
            continue
        wanted = [("CPU", cpus_per_worker), ("GPU", gpus_per_worker)]
        fits = [node["Resources"].get(kind, 0) / count for kind, count in wanted if count > 0]
        # 1e-9: 0.3 / 0.1 is 2.9999999999999996, and Ray itself counts in ten thousandths
        fitting += math.floor(min(fits) + 1e-9) if fits else sys.maxsize
    return fitting


def total(nodes: list[dict], kind: str) -> float:
    """How much of a resource the living nodes have together."""
    return sum(node["Resources"].get(kind, 0) for node in nodes if node["Alive"])


def room(nodes: list[dict]) -> str:
    """What there is in words."""
    alive = sum(node["Alive"] for node in nodes)
    return f"{total(nodes, 'CPU'):g} CPU and {total(nodes, 'GPU'):g} GPU on {alive} node{'s' * (alive != 1)}"
