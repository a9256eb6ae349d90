"""Pools of real actors, whose processes are killed and stopped for real."""

import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from ray._private.internal_api import memory_summary

from cluster.actor_pool import ActorPool, ActorResources, Done, PoolEvent
from cluster.errors import ClusterError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

WAIT_S = 60
LONG_S = 4.0  # longer than a busy machine takes to do what is short


class Worker:
    """Does what it is told, and remembers the states it was given."""

    def __init__(self, fail: str = "", sleep_s: float = 0.0):
        time.sleep(sleep_s)
        if fail:
            raise RuntimeError(f"a page of text\n{fail}")
        self.seen: list = []

    def double(self, number: int) -> int:
        return 2 * number

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def boom(self) -> None:
        raise KeyError("first line\nsecond line\n")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def unpicklable(self):
        return threading.Lock()

    def set(self, value):
        self.seen.append(value)
        return len(self.seen)

    def refuse(self, path: str):
        Path(path).touch()
        raise ValueError("this state is no good")

    def look(self) -> tuple[int, list]:
        return os.getpid(), self.seen

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def size_of(self, array) -> int:
        return array.nbytes


def pool_of(size: int, **settings) -> ActorPool:
    arguments = settings.pop("arguments", {})
    chosen = {"task_timeout_s": 30, "start_timeout_s": WAIT_S, "resources": ActorResources(num_cpus=0.01)} | settings
    return ActorPool(Worker, arguments, size, **chosen)


def finish(pool: ActorPool, timeout_s: float = WAIT_S) -> dict[object, Done]:
    """Wait until nothing is outstanding; what was done, by key, each once."""
    deadline, done = time.monotonic() + timeout_s, {}
    while pool.outstanding() and time.monotonic() < deadline:
        for each in pool.wait(deadline - time.monotonic()):
            assert each.key not in done
            done[each.key] = each
    assert not pool.outstanding()
    return done


def wait_for(condition, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(pool: ActorPool) -> dict[int, int]:
    """The processes of all actors, once all have started."""
    pool.set_state(0, "set", "begin", timeout_s=WAIT_S)
    pool.wait_state(0, WAIT_S)
    pids = pool.pids()
    assert len(pids) == pool.size
    return pids


@pytest.fixture(scope="module")
def shared(ray_session):
    """Three actors for tests that harm none of them."""
    with pool_of(3) as pool:
        yield pool


def test_values_come_back_by_key(shared):
    assert shared.wait(5) == []  # nothing under way: at once
    for number in range(50):
        shared.submit(("double", number), "double", number)
    done = finish(shared)
    assert {key: each.value for key, each in done.items()} == {("double", n): 2 * n for n in range(50)}
    assert {each.failure for each in done.values()} == {None}
    assert {each.actor for each in done.values()} <= {0, 1, 2}


def test_wait_returns_what_there_is_and_respects_its_timeout(shared):
    shared.submit("long", "sleep", LONG_S)
    shared.submit("short", "double", 4)
    (first,) = shared.wait(WAIT_S)
    assert (first.key, first.value) == ("short", 8)
    assert shared.wait(0.1) == [] and shared.outstanding() == {"long"}
    with pytest.raises(ValueError, match="'long' is outstanding"):
        shared.submit("long", "double", 1)
    (last,) = shared.wait(WAIT_S)
    assert (last.key, last.value) == ("long", LONG_S) and last.seconds >= LONG_S


def test_wait_wakes_for_a_reference_of_somebody_else(shared):
    soon = ray.put(1)
    shared.submit("long", "sleep", LONG_S)
    assert shared.wait(WAIT_S, wake=[soon]) == []
    assert shared.outstanding() == {"long"}
    finish(shared)
    assert shared.wait(WAIT_S, wake=[soon]) == []


def test_what_a_method_raises_is_a_failure_of_one_line(shared):
    shared.submit("boom", "boom")
    shared.submit("absent", "no_such_method")
    shared.submit("value", "unpicklable")
    done = finish(shared)
    assert {key: (each.failure.kind, each.failure.attempts, each.value) for key, each in done.items()} == {
        key: ("raised", 1, None) for key in ("boom", "absent", "value")
    }
    assert done["boom"].failure.message == "KeyError: 'first line\\nsecond line\\n'"
    assert "no_such_method" in done["absent"].failure.message
    assert all("\n" not in each.failure.message for each in done.values())


def test_references_arrive_as_objects_and_lost_ones_are_said(shared):
    lost = lost_reference()
    shared.submit("mine", "size_of", ray.put(memory(1000)))
    shared.submit("lost", "size_of", lost)
    done = finish(shared)
    assert done["mine"].value == 1000
    assert (done["lost"].failure.kind, done["lost"].failure.attempts) == ("lost", 1)
    assert "OwnerDiedError" in done["lost"].failure.message


def test_forgotten_tasks_leave_nothing_behind(shared):
    start(shared)  # three of the twenty are under way, and none is done
    for number in range(20):
        shared.submit(number, "sleep", 0.4)
    shared.cancel_all()
    assert shared.outstanding() == set() and shared.wait(1) == []
    for number in range(6):  # the same keys again, answered by actors that are still at the old tasks
        shared.submit(number, "double", number)
    assert {key: each.value for key, each in finish(shared).items()} == {n: 2 * n for n in range(6)}


def test_a_task_that_raises_is_tried_again_where_asked(ray_session):
    events: list[PoolEvent] = []
    resources = ActorResources(num_cpus=0.01, env_vars={"OMP_NUM_THREADS": "7"})
    with pool_of(1, retry_raised=True, retries=1, on_event=events.append, resources=resources) as pool:
        pool.submit("boom", "boom")
        pool.submit("environment", "environment", "OMP_NUM_THREADS")
        done = finish(pool)
    assert done["boom"].failure.attempts == 2
    assert done["environment"].value == "7"
    assert [(event.kind, event.key) for event in events] == [("retried", "boom")]


def test_a_killed_actor_is_replaced_and_its_task_done_by_another(ray_session):
    events: list[PoolEvent] = []
    with pool_of(2, on_event=events.append) as pool:
        before = start(pool)
        pool.submit("a", "sleep", 1.0)
        pool.submit("b", "sleep", 1.0)
        time.sleep(0.3)
        os.kill(before[0], signal.SIGKILL)
        done = finish(pool)
        pool.wait_state(0, WAIT_S)
        after = pool.pids()
    assert {key: (each.value, each.failure) for key, each in done.items()} == {"a": (1.0, None), "b": (1.0, None)}
    assert before[1] == after[1] and before[0] != after[0]
    died, retried, replaced = sorted(events, key=lambda event: ("died", "retried", "replaced").index(event.kind))
    assert (died.kind, died.actor, died.reason) == (
        "died",
        0,
        "its process has died (killed, out of memory or crashed)",
    )
    assert 0.2 < died.lost_seconds < 1.0
    assert (retried.kind, retried.key) == ("retried", "a")
    assert (replaced.kind, replaced.actor) == ("replaced", 0) and replaced.seconds > 0


def test_a_stopped_process_is_found_to_hang_and_killed(ray_session):
    events: list[PoolEvent] = []
    with pool_of(2, on_event=events.append) as pool:
        before = start(pool)
        pool.submit("a", "sleep", 0.5, timeout_s=1.5)
        pool.submit("b", "sleep", 0.5, timeout_s=1.5)
        os.kill(before[1], signal.SIGSTOP)
        done = finish(pool)
        wait_for(lambda: not psutil.pid_exists(before[1]), timeout_s=3)  # Ray alone would take five seconds
    assert {key: (each.value, each.failure) for key, each in done.items()} == {"a": (0.5, None), "b": (0.5, None)}
    assert [(event.kind, event.actor, event.key) for event in events[:2]] == [("hung", 1, None), ("retried", 1, "b")]
    assert events[0].reason == "its task took more than 1.5 s" and events[0].lost_seconds >= 1.5


def test_a_task_that_kills_its_actors_fails_alone(ray_session):
    with pool_of(2, retries=1, max_replacements=5) as pool:
        pool.submit("poison", "die")
        for number in range(6):
            pool.submit(number, "double", number)
        done = finish(pool)
    failure = done.pop("poison").failure
    assert (failure.kind, failure.attempts) == ("died", 2)
    assert {key: each.value for key, each in done.items()} == {n: 2 * n for n in range(6)}


def test_a_task_does_not_use_up_its_attempts_on_actors_that_died_unnoticed(ray_session):
    with pool_of(4, retries=1) as pool:
        for pid in start(pool).values():
            os.kill(pid, signal.SIGKILL)
        pool.submit("a", "double", 4)
        done = finish(pool)
    assert (done["a"].value, done["a"].failure) == (8, None)


def test_a_constructor_that_keeps_failing_ends_the_pool_with_its_message(ray_session):
    with pool_of(1, arguments={"fail": "model.size=9 is no size"}, max_replacements=2) as pool:
        pool.submit("a", "double", 4)
        with pytest.raises(ClusterError) as error:
            finish(pool)
        with pytest.raises(ClusterError):
            pool.wait(0)
    assert str(error.value) == (
        "Worker actor 0 was lost 3 times and no task was done in between; the last time its constructor raised "
        "RuntimeError: model.size=9 is no size"
    )


def test_actors_that_find_no_place_or_start_too_slowly_are_not_tried_for_ever(ray_session):
    for settings in ({"resources": ActorResources(num_cpus=1000)}, {"arguments": {"sleep_s": 60}}):
        with pool_of(1, start_timeout_s=1.0, **settings) as pool, pytest.raises(ClusterError) as error:
            pool.submit("a", "double", 4)
            finish(pool)
        assert str(error.value).startswith("none of 1 Worker actors has started within 1 s; see that the cluster has")


def test_every_actor_runs_the_newest_state_before_its_next_task(ray_session):
    with pool_of(2) as pool:
        before = start(pool)
        pool.submit("busy", "sleep", 1.0)
        for version in (1, 2, 3):
            pool.set_state(version, "set", ray.put([version]), timeout_s=WAIT_S)
        states = pool.wait_state(3, WAIT_S)
        # The busy one skipped what it had not begun; the idle one may have taken up the first.
        assert states[0] == (3, 2)
        pool.submit("look 0", "look")
        pool.submit("look 1", "look")
        done = finish(pool)
        assert done["look 0"].value == (before[0], ["begin", [3]])
        os.kill(before[0], signal.SIGKILL)
        os.kill(before[1], signal.SIGKILL)
        pool.submit("look 0", "look")
        pool.submit("look 1", "look")
        done = finish(pool)
        assert [each.value[1] for each in done.values()] == [[[3]], [[3]]]  # before the first task of new ones, too
        assert pool.wait_state(3, WAIT_S) == {0: (3, 1), 1: (3, 1)}
        assert {each.value[0] for each in done.values()} <= {*pool.pids().values()} - {*before.values()}
        # Versions may go back, as when a run goes on from an older checkpoint.
        pool.set_state(2, "set", "back", timeout_s=WAIT_S)
        assert pool.wait_state(2, WAIT_S) == {0: (2, 2), 1: (2, 2)}
        with pytest.raises(ValueError, match="version=3 is not the newest"):
            pool.wait_state(3, 1)


def test_a_state_that_no_actor_can_take_ends_the_pool(ray_session, tmp_path):
    with pool_of(1, max_replacements=1) as pool:
        start(pool)
        pool.set_state(1, "refuse", str(tmp_path / "tried"), timeout_s=WAIT_S)
        with pytest.raises(ClusterError, match="its state call raised ValueError: this state is no good"):
            pool.wait_state(1, WAIT_S)
    assert (tmp_path / "tried").exists()
    lost = lost_reference()
    with pool_of(1) as pool:
        start(pool)
        pool.set_state(1, "set", lost, timeout_s=WAIT_S)
        with pytest.raises(ClusterError, match=r"the state of version 1 for Worker actors cannot be had: .*OwnerDied"):
            pool.wait_state(1, WAIT_S)


def test_waiting_for_a_state_names_who_is_behind(ray_session):
    with pool_of(2) as pool:
        start(pool)
        pool.submit("busy", "sleep", 30)
        pool.set_state(1, "set", 1, timeout_s=WAIT_S)
        with pytest.raises(
            ClusterError, match=r"1 of 2 Worker actors have not taken version 1 within 0.5 s \(actors 0\)"
        ):
            pool.wait_state(1, 0.5)


def test_each_task_is_done_once_whoever_is_killed(ray_session):
    rng = random.Random(0)
    events: list[PoolEvent] = []
    with pool_of(4, retries=20, max_replacements=20, task_timeout_s=2.0, on_event=events.append) as pool:
        pids = start(pool)
        done: Counter = Counter()
        submitted, killed, next_kill = 0, 0, 0.0
        deadline = time.monotonic() + WAIT_S
        while (submitted < 200 or killed < 6 or pool.outstanding()) and time.monotonic() < deadline:
            while (submitted < 200 or killed < 6) and len(pool.outstanding()) < 12:
                pool.submit(submitted, "sleep", rng.choice([0.0, 0.01, 0.03, 0.05]))
                submitted += 1
            for each in pool.wait(0.5):
                assert each.failure is None
                done[each.key] += 1
            if killed < 6 and time.monotonic() > next_kill and (pids := pool.pids()):
                victim = rng.choice(sorted(pids))
                how = signal.SIGSTOP if killed == 3 else signal.SIGKILL
                os.kill(pids[victim], how)
                killed, next_kill = killed + 1, time.monotonic() + 0.4
        assert done == Counter(range(submitted))
    lost = [event for event in events if event.kind in ("died", "hung")]
    assert 3 <= len(lost) <= killed  # a victim may have died before it was noticed that the last one did


def test_states_do_not_pile_up_in_the_object_store(ray_session):
    size = 4 * 2**20
    with pool_of(2) as pool:
        start(pool)
        for version in range(1, 201):
            pool.set_state(version, "size_of", ray.put(memory(size)), timeout_s=WAIT_S)
            if version % 10 == 0:
                pool.wait_state(version, WAIT_S)
        # Ray frees in batches, about once a second: in the end the newest is left.
        wait_for(lambda: stored_bytes(ray_session) < 2 * size, timeout_s=20)
        time.sleep(1.5)
        assert size <= stored_bytes(ray_session) < 2 * size
        assert pool.wait_state(200, WAIT_S) == {0: (200, size), 1: (200, size)}


def test_closing_leaves_no_process(ray_session, tmp_path):
    with pool_of(3) as pool:
        pids = start(pool)
        pool.submit("busy", "sleep", 60)
        os.kill(pids[2], signal.SIGSTOP)
        assert all(psutil.pid_exists(pid) for pid in pids.values())
        pool.close(timeout_s=1)
        assert not any(psutil.pid_exists(pid) for pid in pids.values())
        with pytest.raises(ClusterError, match="the pool of Worker actors is closed"):
            pool.submit("late", "double", 1)


class Owner:
    def put(self) -> list:
        return [ray.put(memory(1_000_000))]


def lost_reference():
    """A reference to an object whose owner has died."""
    owner = ray.remote(Owner).options(num_cpus=0).remote()
    (ref,) = ray.get(owner.put.remote(), timeout=WAIT_S)
    ray.kill(owner)
    deadline = time.monotonic() + WAIT_S
    with pytest.raises(ray.exceptions.OwnerDiedError):
        while time.monotonic() < deadline:
            ray.get(ref, timeout=WAIT_S)
            time.sleep(0.1)
    return ref


def memory(size: int) -> np.ndarray:
    return np.zeros(size, dtype=np.uint8)


def stored_bytes(session) -> int:
    """What Ray's object store holds, as `ray memory` says."""
    summary = memory_summary(session.gcs_address, stats_only=True)
    found = re.search(r"Plasma memory usage (\d+) MiB", summary)
    assert found, summary
    return int(found[1]) * 2**20
