"""What a pool does next with an actor, from its status and the clock alone."""

import pytest

from cluster.actor_status import CHECK_EVERY_S, ActorStatus, Call, Step, next_step, next_time, pause_before


def actor(**status) -> ActorStatus:
    return ActorStatus(0, **{"handle": object(), "pid": 1, "state": 4, "idle_since": 100.0} | status)


def call(kind: str) -> Call:
    return Call(kind, ref=None, since=100.0, timeout_s=5.0)


@pytest.mark.parametrize(
    ("status", "has_task", "now", "step"),
    [
        ({"handle": None, "not_before": 101.0}, True, 100.9, Step.WAIT),
        ({"handle": None, "not_before": 101.0}, True, 101.0, Step.START),
        ({"call": call("start"), "pid": None, "state": 0}, True, 104.9, Step.WAIT),
        ({"call": call("start"), "pid": None, "state": 0}, True, 105.0, Step.GIVE_UP),
        ({"call": call("task"), "state": 3}, True, 104.9, Step.WAIT),  # the new state comes after its task
        ({"call": call("task")}, False, 105.0, Step.GIVE_UP),
        ({"state": 3}, True, 100.0, Step.SET_STATE),
        ({"state": 3, "suspect": True}, True, 100.0, Step.SET_STATE),  # which shows as well that it is alive
        ({"suspect": True}, True, 100.0, Step.CHECK),
        ({}, True, 100.0 + 2 * CHECK_EVERY_S, Step.GIVE_TASK),
        ({}, False, 100.0 + CHECK_EVERY_S, Step.CHECK),
        ({}, False, 99.9 + CHECK_EVERY_S, Step.WAIT),
    ],
)
def test_the_next_step(status: dict, has_task: bool, now: float, step: Step):
    assert next_step(actor(**status), newest_state=4, has_task=has_task, now=now) is step


@pytest.mark.parametrize(
    "status", [{"handle": None, "not_before": 101.0}, {"call": call("task")}, {}], ids=["vacant", "busy", "idle"]
)
def test_nothing_is_done_before_the_next_time_and_something_then(status: dict):
    at = next_time(actor(**status))
    assert next_step(actor(**status), newest_state=4, has_task=False, now=at - 0.01) is Step.WAIT
    assert next_step(actor(**status), newest_state=4, has_task=False, now=at) is not Step.WAIT


def test_pauses_grow_to_half_a_minute():
    assert [pause_before(lost) for lost in (0, 1, 2, 3, 4, 8, 9, 5000)] == [0, 0, 0.5, 1, 2, 30, 30, 30]
