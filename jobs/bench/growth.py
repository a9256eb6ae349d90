"""How sampling grows with the number of actors, and how long new weights take to reach them all.

The actors, their pool, the packing and the object store are those of a run; the policy is a stand-in that sleeps, so
that what is measured is what the pool takes away and not how many cores this machine has.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.bench.measuring import in_units, short

if TYPE_CHECKING:
    from rich.table import Table

_PATIENCE_S = 600.0
_TENSOR_BYTES = 4 * 2**20


@dataclass(frozen=True)
class GrowthRow:
    """One size of the pool. ``efficiency``: samples per second and actor, as a share of the first row's."""

    actors: int
    samples: int
    seconds: float
    samples_per_second: float
    efficiency: float


@dataclass(frozen=True)
class PublishRow:
    """One size of the weights; medians over the rounds.

    ``load_seconds`` end when every actor has checked and mapped them; ``bytes_per_second`` is of all three together.
    """

    num_bytes: int
    actors: int
    pack_seconds: float
    put_seconds: float
    load_seconds: float
    bytes_per_second: float


class SleepingPolicy:
    """Answers every request after ``latency_s``, as a policy on an accelerator of its own would."""

    def __init__(self, latency_s: float) -> None:
        self.latency_s = latency_s

    def begin(self) -> None:
        """Nothing: whoever has done it has started."""

    def sample(self, request: int) -> int:
        """The request."""
        time.sleep(self.latency_s)
        return request


class WeightReader:
    """Takes weights up as a rollout actor does."""

    def load(self, version: int, refs: list[Any]) -> int:
        """Fetch, check and map; the number of tensors."""
        from cluster.weights import fetch, unpack

        packed = fetch(refs[0], _PATIENCE_S, version)
        self.tensors = unpack(packed) if packed is not None else {}
        return len(self.tensors)


def measure_growth(
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32), latency_s: float = 0.5, samples_per_actor: int = 10
) -> list[GrowthRow]:
    """Samples per second of pools of these sizes; each actor's share is ``samples_per_actor`` requests.

    Uses the Ray that this process has initialised, or one of its own.
    """
    from cluster.actor_pool import ActorPool, ActorResources

    rows: list[GrowthRow] = []
    with _ray_session():
        for size in sizes:
            with ActorPool(
                SleepingPolicy,
                {"latency_s": latency_s},
                size,
                resources=ActorResources(num_cpus=0.01),
                task_timeout_s=_PATIENCE_S,
                start_timeout_s=_PATIENCE_S,
            ) as pool:
                pool.set_state(0, "begin", timeout_s=_PATIENCE_S)
                pool.wait_state(0, _PATIENCE_S)
                samples = size * samples_per_actor
                started = time.perf_counter()
                for request in range(samples):
                    pool.submit(request, "sample", request)
                while pool.outstanding():
                    pool.wait(_PATIENCE_S)
                seconds = time.perf_counter() - started
            first = rows[0].samples_per_second / rows[0].actors if rows else samples / seconds / size
            rows.append(GrowthRow(size, samples, seconds, samples / seconds, samples / seconds / size / first))
    return rows


def measure_publish(
    sizes_in_bytes: Sequence[int] = (10**6, 10**7, 10**8), actors: int = 4, rounds: int = 5
) -> list[PublishRow]:
    """Seconds from tensors on the CPU to weights in every actor, for float32 weights of these sizes.

    Uses the Ray that this process has initialised, or one of its own.
    """
    from cluster.actor_pool import ActorPool, ActorResources

    with (
        _ray_session(),
        ActorPool(
            WeightReader,
            {},
            actors,
            resources=ActorResources(num_cpus=0.01),
            task_timeout_s=_PATIENCE_S,
            start_timeout_s=_PATIENCE_S,
        ) as pool,
    ):
        _publish_once(pool, _TENSOR_BYTES, version=0)  # torch is imported, and the store in use
        rows, version = [], 0
        for size in sizes_in_bytes:
            times = []
            for _ in range(rounds):
                version += 1
                times.append(_publish_once(pool, size, version))
            pack_seconds, put_seconds, load_seconds = (statistics.median(each) for each in zip(*times, strict=True))
            rate = size / (pack_seconds + put_seconds + load_seconds)
            rows.append(PublishRow(size, actors, pack_seconds, put_seconds, load_seconds, rate))
    return rows


def _publish_once(pool: Any, size: int, version: int) -> tuple[float, float, float]:
    """Seconds to pack, to put, and until all actors have loaded."""
    import torch

    from cluster.weights import pack, publish

    count = size // 4
    parts = torch.ones(count).split(_TENSOR_BYTES // 4)
    started = time.perf_counter()
    packed = pack(((str(index), part) for index, part in enumerate(parts)), version)
    is_packed = time.perf_counter()
    ref = publish(packed)
    is_put = time.perf_counter()
    pool.set_state(version, "load", version, [ref], timeout_s=_PATIENCE_S)
    found = pool.wait_state(version, _PATIENCE_S)
    is_loaded = time.perf_counter()
    assert set(found.values()) == {(version, len(parts))}, found
    return is_packed - started, is_put - is_packed, is_loaded - is_put


@contextmanager
def _ray_session() -> Iterator[None]:
    from cluster.session import RaySession

    with (
        tempfile.TemporaryDirectory(prefix="mmada-bench-") as folder,
        RaySession(None, workers=1, cpus_per_worker=1, gpus_per_worker=0, log_dir=Path(folder), timeout_s=120),
    ):
        yield


def growth_table(rows: Sequence[GrowthRow]) -> Table:
    """A row for each size of the pool."""
    from jobs.plan_report import table_of

    table = table_of("actors", "samples", "seconds", "samples/s", "efficiency")
    for row in rows:
        figures = short(row.seconds), short(row.samples_per_second), f"{row.efficiency:.1%}"
        table.add_row(str(row.actors), str(row.samples), *figures)
    return table


def publish_table(rows: Sequence[PublishRow]) -> Table:
    """A row for each size of the weights."""
    from jobs.plan_report import table_of

    table = table_of("bytes of weights", "actors", "pack, ms", "put, ms", "all have it, ms", "bytes/s")
    for row in rows:
        parts = (row.pack_seconds, row.put_seconds, row.load_seconds)
        times = (short(1e3 * seconds) for seconds in parts)
        table.add_row(in_units(row.num_bytes), str(row.actors), *times, in_units(row.bytes_per_second))
    return table
