"""The growth of a pool of actors and the way of the weights, at small sizes."""

import io

import pytest
from rich.console import Console

from cluster.session import RaySession
from jobs.bench.growth import GrowthRow, PublishRow, growth_table, measure_growth, measure_publish, publish_table


@pytest.fixture(scope="module")
def ray_session(tmp_path_factory):
    with RaySession(None, workers=1, cpus_per_worker=1, gpus_per_worker=0, log_dir=tmp_path_factory.mktemp("ray")):
        yield


def printed(table) -> list[list[str]]:
    """The words of the table's rows, which come after a line."""
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
    return lines[2:]


def test_growth_counts_every_sample_and_compares_with_the_first_size(ray_session):
    one, three = rows = measure_growth(sizes=(1, 3), latency_s=0.05, samples_per_actor=4)
    assert [(row.actors, row.samples) for row in rows] == [(1, 4), (3, 12)]
    assert one.seconds >= 4 * 0.05 and three.seconds >= 4 * 0.05  # no actor is at two samples at once
    for row in rows:
        assert row.samples_per_second == pytest.approx(row.samples / row.seconds)
        assert row.efficiency == pytest.approx(row.samples_per_second / row.actors / one.samples_per_second)
    assert one.efficiency == 1


def test_publishing_is_measured_from_the_tensors_to_the_last_actor(ray_session):
    small, large = measure_publish(sizes_in_bytes=(1000, 9_000_000), actors=2, rounds=2)  # one tensor, and three
    assert [(row.num_bytes, row.actors) for row in (small, large)] == [(1000, 2), (9_000_000, 2)]
    for row in (small, large):
        parts = (row.pack_seconds, row.put_seconds, row.load_seconds)
        assert min(parts) > 0 and row.bytes_per_second == pytest.approx(row.num_bytes / sum(parts))


def test_tables_say_what_was_measured():
    growth = [GrowthRow(1, 10, 5.0, 2.0, 1.0), GrowthRow(32, 320, 5.25, 60.94, 0.9523)]
    assert printed(growth_table(growth)) == [
        ["1", "10", "5.00", "2.00", "100.0%"],
        ["32", "320", "5.25", "60.9", "95.2%"],
    ]
    publish = [PublishRow(10**8, 4, 0.1, 0.05, 0.0125, 6.15e8)]
    assert printed(publish_table(publish)) == [["100", "M", "4", "100", "50.0", "12.5", "615", "M"]]
