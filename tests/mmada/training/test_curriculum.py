"""Stages, pacing and ways on: every rule worked out by hand, and states that survive being written down."""

import json
import math

import pytest

from mmada.training.curriculum import (
    Advance,
    Pacing,
    StagePlan,
    StageState,
    after_evaluation,
    after_step,
    competence,
    is_done,
    open_difficulty,
    schedule_position,
)


def at(step: int, **values) -> StageState:
    return StageState(step=step, step_in_stage=step, **values)


def test_the_line_and_the_root_of_competence():
    line = StagePlan("s", 100, pacing=Pacing("linear", start=0.2))
    root = StagePlan("s", 100, pacing=Pacing("root", start=0.2))
    assert [competence(line, at(step)) for step in (0, 50, 100)] == pytest.approx([0.2, 0.6, 1.0])
    # c(t) = sqrt(t (1 - c0²) / T + c0²)
    assert [competence(root, at(step)) for step in (0, 25, 100)] == pytest.approx([0.2, math.sqrt(0.28), 1.0])
    half = StagePlan("s", 100, pacing=Pacing("linear", start=0.0, over=0.5))
    assert [competence(half, at(step)) for step in (25, 50, 75)] == [0.5, 1.0, 1.0]


def test_the_sources_rule_is_clipped_and_does_not_turn_back():
    pacing = Pacing("source", start=0.1, metric="accuracy", threshold=0.5, smoothing=0.0)
    plans = [StagePlan("s", 10, pacing=pacing)]
    state = StageState()
    for _ in range(5):
        state = after_step(plans, state)
    assert competence(plans[0], state) == 0.1  # nothing is known of how well it does
    well = after_evaluation(plans, state, {"accuracy": 1.0})  # twice as well as asked
    assert competence(plans[0], well) == pytest.approx(1.0)  # 0.1 + 0.9 · 0.5 · 2
    opened = after_step(plans, well)
    worse = after_evaluation(plans, opened, {"accuracy": 0.05})
    assert competence(plans[0], worse) == pytest.approx(1.0)  # with the ratchet; without:
    loose = [StagePlan("s", 10, pacing=Pacing("source", 0.1, 1.0, "accuracy", 0.5, smoothing=0.0, ratchet=False))]
    assert competence(loose[0], worse) == pytest.approx(0.1 + 0.9 * 0.6 * 0.1)


def test_a_gate_opens_when_it_has_been_passed_often_enough():
    pacing = Pacing("gated", start=0.25, metric="accuracy", threshold=0.8, times=2, rise=0.5)
    plans = [StagePlan("s", 100, difficulty=(0.2, 0.6), pacing=pacing)]
    state = after_step(plans, StageState())
    opened = []
    for accuracy in (0.9, 0.7, 0.8, 0.8, 0.9, 1.0, 1.0, 1.0):
        state = after_evaluation(plans, state, {"accuracy": accuracy})
        opened.append(competence(plans[0], state))
    assert opened == [0.25, 0.25, 0.25, 0.75, 0.75, 1.0, 1.0, 1.0]
    assert open_difficulty(plans[0], at(3, competence=0.25)) == pytest.approx((0.2, 0.3))


def test_stages_follow_each_other_and_the_schedule_catches_up():
    advance = Advance("threshold", "accuracy", threshold=0.9, times=2)
    plans = [StagePlan("a", 3), StagePlan("b", 10, advance=advance), StagePlan("c", 2)]
    state = StageState()
    for _ in range(3):
        state = after_step(plans, state)
    assert (state.step, state.stage, state.step_in_stage, state.ended) == (3, 1, 0, (3,))
    state = after_evaluation(plans, state, {"accuracy": 1.0})  # that of the stage which has just ended
    assert state.passes == 0
    for accuracy in (1.0, 0.5, 0.9, 0.9):
        state = after_evaluation(plans, after_step(plans, state), {"accuracy": accuracy, "other": 3.0})
    assert (state.step, state.stage, state.ended) == (7, 2, (3, 7))
    assert schedule_position(plans, state) == 13  # 7 steps are done, 13 as planned lie behind
    state = after_step(plans, after_step(plans, state))
    assert is_done(plans, state) and state.step == 9 and schedule_position(plans, state) == 15


def test_a_plateau_ends_a_stage():
    advance = Advance("plateau", "loss", lower_is_better=True, times=2, min_delta=0.1)
    plans = [StagePlan("a", 100, advance=advance), StagePlan("b", 1)]
    state = after_step(plans, StageState())
    stages = []
    for loss in (2.0, 1.95, 1.8, 1.75, 1.71):
        state = after_evaluation(plans, state, {"loss": loss})
        stages.append(state.stage)
    assert stages == [0, 0, 0, 0, 1]


def test_a_state_comes_back_from_json_as_it_was():
    state = StageState(7, 1, 3, 1, 0.5, 2, 1, 0.25, 0.75, (4,), {"text": (1, 20), "tasks": (0, 3)})
    assert StageState.from_json(json.loads(json.dumps(state.to_json()))) == state
