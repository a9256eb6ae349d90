"""Which versions are evaluated, and that the last one always is: decided without actors."""

from __future__ import annotations

from typing import Any

from cluster.actor_pool import Done
from jobs.recipe import load_recipe
from jobs.rl.evaluation_loop import EvaluationLoop
from jobs.rl.messages import Evaluated


class Calls:
    """Keeps what would be asked of the actors."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, list[int], int]] = []

    def submit(self, key: Any, method: str, items: list[int], version: int) -> None:
        assert method == "evaluate"
        self.asked.append((key, items, version))

    def answer(self, loop: EvaluationLoop, version: int | None, place: int = 0) -> None:
        """The actor that has ``version`` answers the call at ``place``: even problems are solved."""
        key, items, wanted = self.asked.pop(place)
        answers = [(item, item % 2 == 0) for item in items] if version == wanted else []
        assert loop.take(Done(key, Evaluated(version, answers), None, 0, 1.0), self) is None


def make(iterations: int, every: int) -> tuple[EvaluationLoop, Calls, dict[int, int]]:
    recipe = load_recipe("ppo-debug", [f"ppo.iterations={iterations}", f"ppo.evaluate_every={every}"])
    assert recipe.ppo is not None
    results: dict[int, int] = {}
    loop = EvaluationLoop(recipe.ppo, 6, {}, lambda version, count: results.update({version: count}))
    return loop, Calls(), results


def test_first_last_and_every_so_many_are_evaluated_once():
    loop, calls, results = make(5, 2)
    for version in range(6):
        for _ in range(2):  # published again by learners that began again
            loop.begin(version, calls)
            while calls.asked:
                calls.answer(loop, version)
    assert results == {0: 6, 2: 6, 4: 6, 5: 6}


def test_the_last_waits_for_one_that_is_under_way_and_others_are_passed_over():
    loop, calls, results = make(4, 1)
    loop.begin(1, calls)
    assert len(calls.asked) == 2  # of two rollout actors
    for version in (2, 3, 4):
        loop.begin(version, calls)
    calls.answer(loop, 1)
    calls.answer(loop, 1)
    assert loop.is_busy and results == {1: 6} and {version for *_, version in calls.asked} == {4}
    while calls.asked:
        calls.answer(loop, 4)
    assert results == {1: 6, 4: 6} and not loop.is_busy


def test_a_version_that_the_actors_no_longer_have_is_given_up():
    loop, calls, results = make(4, 1)
    loop.begin(1, calls)
    loop.begin(4, calls)
    calls.answer(loop, 1)
    calls.answer(loop, 4)  # has taken up the last one meanwhile
    assert results == {} and {version for *_, version in calls.asked} == {4}
    while calls.asked:
        calls.answer(loop, 4)
    assert results == {4: 6}


def test_actors_that_have_not_taken_it_up_yet_are_asked_again():
    loop, calls, results = make(4, 0)
    loop.begin(0, calls)
    calls.answer(loop, None)
    calls.answer(loop, 0)
    calls.answer(loop, 0)
    assert results == {0: 6}


def test_new_learners_forget_what_was_under_way():
    loop, calls, results = make(4, 0)
    loop.begin(0, calls)
    loop.forget(0)
    calls.answer(loop, 0)
    assert not loop.is_busy and results == {}


def test_what_learners_do_again_is_measured_again():
    loop, calls, results = make(4, 1)
    for version in (0, 1, 2):
        loop.begin(version, calls)
        while calls.asked:
            calls.answer(loop, version)
    assert loop.known == {0: 0.5, 1: 0.5, 2: 0.5}
    loop.forget(1)  # versions 0 and 1 are those of the checkpoint, 2 will be another policy
    assert loop.known == {0: 0.5, 1: 0.5}
    results.clear()
    for version in (1, 2):
        loop.begin(version, calls)
        while calls.asked:
            calls.answer(loop, version)
    assert results == {2: 6}
