"""The exchange between two sides that come, wait, die and come back, on a real Ray."""

import os
import pickle
import signal
import sys
import time

import psutil
import pytest
import ray

from cluster.errors import ClusterError
from cluster.exchange import Begun, Exchange, Published, Stopped

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

WAIT_S = 60


@pytest.fixture
def exchange(ray_session):
    made = Exchange.start()
    yield made
    made.close()


@ray.remote(num_cpus=0)
def attempt(exchange: Exchange, method: str, *args, **named):
    """What a client's method gives in another process: its value, or name and message of what it raises."""
    try:
        value = getattr(exchange, method)(*args, **named)
    except Exception as error:
        return type(error).__name__, str(error)
    return ray.get(value, timeout=WAIT_S) if isinstance(value, ray.ObjectRef) else value


@ray.remote(num_cpus=0)
class Learner:
    """Publishes references that it owns."""

    def publish(self, exchange: Exchange, version: int, payload: str) -> None:
        exchange.publish(version, {"weights": ray.put(payload * 1000), "loss": 0.5})


def result(ref):
    return ray.get(ref, timeout=WAIT_S)


def test_batches_and_weights_go_both_ways(exchange):
    assert exchange.news(0) == []
    waiting = [attempt.remote(exchange, "take", 4, WAIT_S) for _ in range(2)]  # two ranks, before there is anything
    assert result(attempt.remote(exchange, "begin", 4)) == 1
    (begun,) = exchange.news(0, WAIT_S)
    assert begun == Begun(number=1, generation=1, start=4)
    assert exchange.offer(1, 4, ray.put("the batch"))  # this process keeps no reference of its own
    assert result(waiting[0]) == result(waiting[1]) == "the batch"
    assert result(attempt.remote(exchange, "take", 4, WAIT_S, generation=1)) == "the batch"

    learner = Learner.remote()
    for version in (5, 6):
        result(learner.publish.remote(exchange, version, "x"))
    first, second, third = exchange.news(0)
    assert first == begun and [(each.number, each.version, each.generation) for each in (second, third)] == [
        (2, 5, 1),
        (3, 6, 1),
    ]
    assert isinstance(third, Published) and third.payload["loss"] == 0.5
    assert result(third.payload["weights"]) == "x" * 1000
    assert exchange.news(2) == [third] and exchange.news(3) == []
    ray.kill(learner)


def test_news_wake_who_waits_for_them(exchange):
    asked = exchange.ask_news(0, WAIT_S)
    assert ray.wait([asked], timeout=0.3)[0] == []
    exchange.begin(0)
    assert exchange.read_news(asked, WAIT_S) == [Begun(1, 1, 0)]
    assert exchange.news(1, 0.2) == []
    later = attempt.remote(exchange, "news", 1, WAIT_S)
    time.sleep(0.2)
    exchange.begin(7)
    assert result(later) == [Begun(2, 2, 7)]


def test_a_new_generation_drops_what_the_old_one_left(exchange):
    exchange.begin(0)
    assert exchange.offer(1, 0, ray.put("old")) and exchange.offer(1, 1, ray.put("old"))
    orphan = attempt.remote(exchange, "take", 9, WAIT_S, generation=1)
    time.sleep(0.2)
    assert exchange.begin(1) == 2
    assert exchange.offer(1, 1, ray.put("older still")) is False
    with pytest.raises(ClusterError, match="waited 0.3 s for the batch of iteration 1 in vain"):
        exchange.take(1, 0.3)
    assert exchange.offer(2, 1, ray.put("new")) is True
    assert result(exchange.take(1, WAIT_S)) == "new"
    error = (
        "ClusterError",
        "waited for the batch of iteration 9, but these learners were replaced: generation 2 has begun",
    )
    assert result(orphan) == error
    assert result(attempt.remote(exchange, "publish", 3, None, generation=1))[0] == "ClusterError"
    exchange.publish(4, None, generation=2)
    assert [type(each).__name__ for each in exchange.news(0)] == ["Begun", "Begun", "Published"]


def test_batches_are_kept_until_the_learners_are_well_past_them(exchange):
    exchange.begin(0)
    for iteration in range(4):
        exchange.offer(1, iteration, ray.put(iteration))
    assert [result(exchange.take(iteration, 1)) for iteration in (0, 1, 0, 2, 1, 3, 2)] == [0, 1, 0, 2, 1, 3, 2]
    with pytest.raises(ClusterError, match="the batch of iteration 1 in vain"):
        exchange.take(1, 0.1)


def test_stopping_wakes_all_and_answers_all_later_ones(exchange):
    exchange.begin(0)
    waiting = [
        attempt.remote(exchange, "take", 3, WAIT_S),
        attempt.remote(exchange, "news", 1, WAIT_S),
    ]
    assert ray.wait(waiting, timeout=0.5)[0] == []
    exchange.stop("the reward gives nothing but NaN")
    exchange.stop("a later reason")
    assert [result(each) for each in waiting] == [("Stopped", "the reward gives nothing but NaN")] * 2
    later = [
        lambda: exchange.take(3, 1),
        lambda: exchange.begin(0),
        lambda: exchange.publish(1, None),
        lambda: exchange.offer(1, 1, ray.put(1)),
        lambda: exchange.news(0),
    ]
    for call in later:
        with pytest.raises(Stopped) as stopped:
            call()
        assert stopped.value.reason == "the reward gives nothing but NaN"
    copy = pickle.loads(pickle.dumps(Stopped("why")))
    assert (type(copy), copy.reason, str(copy)) == (Stopped, "why", "why")


def test_what_a_dead_learner_published_is_lost_and_said_to_be(exchange):
    from cluster.weights import fetch

    learner = Learner.remote()
    result(learner.publish.remote(exchange, 1, "y"))
    ray.kill(learner)
    deadline = time.monotonic() + WAIT_S
    ((published,)) = exchange.news(0)  # the news itself is there
    while True:
        try:
            ray.get(published.payload["weights"], timeout=5)
        except ray.exceptions.OwnerDiedError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert fetch(published.payload["weights"], 5) is None


def test_a_dead_exchange_is_named_with_what_was_waited_for(ray_session):
    exchange = Exchange.start()
    exchange.begin(0)
    waiting = attempt.remote(exchange, "take", 0, WAIT_S)
    time.sleep(0.3)
    exchange.close()
    kind, message = result(waiting)
    assert kind == "ClusterError"
    assert message.startswith("waited for the batch of iteration 0, and the exchange is gone; its process or node")
    with pytest.raises(ClusterError, match="waited for version 1 to be published, and the exchange is gone"):
        exchange.publish(1, None)


def test_a_silent_exchange_is_not_waited_for_for_ever(ray_session, monkeypatch):
    monkeypatch.setattr("cluster.exchange._GRACE_S", 0.5)
    before = board_pids()
    exchange = Exchange.start()
    exchange.begin(0)
    (pid,) = board_pids() - before
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(
        ClusterError, match="waited 1.5 s for the batch of iteration 0, and the exchange does not answer"
    ):
        exchange.take(0, 1.0)
    os.kill(pid, signal.SIGCONT)
    exchange.close()


def board_pids() -> set[int]:
    """Processes of exchanges below this one."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if "_Board" in "".join(process.cmdline()):
                found.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found
