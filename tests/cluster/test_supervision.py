"""Attempts that fail on a real Ray, where room comes and goes with an actor that holds it."""

import pytest
import ray

from cluster.launch import RayLost, WorkersFailed
from cluster.nodes import on_this_node, survey
from cluster.recovery import Policy, Restart, Shrink
from cluster.supervision import NodesLost, Waiting, supervise

EACH = 0.25  # CPUs of a worker


@ray.remote
class Holder:
    """Takes up room for as long as it lives."""

    def ready(self) -> str:
        return ray.get_runtime_context().get_node_id()


def hold(cpus: float) -> ray.actor.ActorHandle:
    holder = Holder.options(num_cpus=cpus).remote()
    ray.get(holder.ready.remote(), timeout=120)
    return holder


def run(attempts: list, policy: Policy) -> tuple[list[int], list]:
    """Supervise attempts, each of which does something and then fails with what it returns; sizes and events."""
    sizes, events = [], []

    def attempt(workers: int) -> None:
        sizes.append(workers)
        error = attempts.pop(0)()
        if error is not None:
            raise error

    supervise(attempt, policy, cpus_per_worker=EACH, gpus_per_worker=0, tell=events.append)
    return sizes, events


def test_a_run_shrinks_to_the_room_that_is_left_and_grows_with_it_again(ray_session):
    places = survey().room(EACH, 0)
    assert places == ray.cluster_resources()["CPU"] / EACH >= 8
    holders = []

    def loses_room() -> WorkersFailed:
        holders.append(hold(2.5 * EACH))  # three of the places: one of them half
        return WorkersFailed("gone")

    def finds_room() -> WorkersFailed:
        ray.kill(holders[0])
        return WorkersFailed("gone again")

    policy = Policy(max_failures=2, sizes=(places - 6, places - 4, places), timeout_s=2)
    sizes, events = run([loses_room, finds_room, lambda: None], policy)
    assert sizes == [places, places - 4, places]
    # How soon Ray knows of the room that came back decides whether it was waited for.
    assert [event for event in events if not isinstance(event, Waiting)] == [Shrink(places - 4), Restart(places)]


def test_what_is_not_to_be_cured_ends_at_once(ray_session):
    hopeless = WorkersFailed("a mistake")
    hopeless.is_final = True
    policy = Policy(max_failures=5, sizes=(1,), timeout_s=60)
    for error in (hopeless, RayLost("Ray was lost")):
        with pytest.raises(type(error), match=str(error)):
            run([lambda error=error: error], policy)


def test_failures_are_counted_and_the_last_is_raised(ray_session):
    attempts = [lambda: WorkersFailed("first"), lambda: WorkersFailed("second"), lambda: WorkersFailed("third")]
    with pytest.raises(WorkersFailed, match="^second$"):
        run(attempts, Policy(max_failures=1, sizes=(1,), timeout_s=60))
    assert len(attempts) == 1


def test_without_room_the_end_names_failure_and_remedy(ray_session):
    total = int(ray.cluster_resources()["CPU"])
    holder = hold(total)
    try:
        events = []
        with pytest.raises(WorkersFailed, match=r"^gone; there is room for 0 of cluster\.workers=1, also after"):
            supervise(
                lambda workers: (_ for _ in ()).throw(WorkersFailed("gone")),
                Policy(max_failures=1, sizes=(1,), timeout_s=6),
                cpus_per_worker=1,
                gpus_per_worker=0,
                tell=events.append,
            )
        assert [type(event) for event in events] == [Waiting] and events[0].room == 0
        assert 0 < events[0].seconds < 1 and not any(isinstance(event, NodesLost) for event in events)
    finally:
        ray.kill(holder)


def test_a_survey_knows_nodes_by_id_and_what_is_free(ray_session):
    here = ray.get_runtime_context().get_node_id()
    found = survey()
    assert [*found.answering] == [here] and found.silent == {}
    holder = Holder.options(num_cpus=0, scheduling_strategy=on_this_node()).remote()
    assert ray.get(holder.ready.remote(), timeout=120) == here
    ray.kill(holder)
