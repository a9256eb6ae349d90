"""Stages of a run: how long each lasts, how hard its rows may be, and what leads on to the next.

Where a run stands is a ``StageState``: plain values, which a checkpoint holds. It changes by two pure functions, after
a step and after an evaluation, so that a resumed run is the uninterrupted one.

Competence is the share of a stage's range of difficulty that is open: a pacing function raises it from its start to 1
(Platanios et al. 2019, arXiv:1903.09848, eqs. 5 to 8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

PacingKind = Literal["linear", "root", "source", "gated"]


@dataclass(frozen=True)
class Pacing:
    """How competence rises within a stage.

    ``kind``: ``linear`` and ``root`` are functions of the steps done, ``source`` scales the straight line by how well
    the model does, ``gated`` rises by ``rise`` whenever the metric has passed ``threshold`` ``times`` evaluations
    running. ``start``: competence at the stage's first step. ``over``: share of the stage's steps after which the
    functions of steps reach 1. ``metric``: of evaluations, for ``source`` (in units of ``threshold``) and ``gated``;
    ``lower_is_better`` of it. ``smoothing``: of the mean of past performance that ``source`` asks.
    ``ratchet``: competence never falls, which ``source`` would let it.
    """

    kind: PacingKind
    start: float = 0.0
    over: float = 1.0
    metric: str | None = None
    threshold: float = 1.0
    lower_is_better: bool = False
    times: int = 1
    rise: float = 0.1
    smoothing: float = 0.9
    ratchet: bool = True


@dataclass(frozen=True)
class Advance:
    """What ends a stage before its last step: a metric of evaluations.

    ``threshold``: it has passed ``threshold`` in ``times`` evaluations running. ``plateau``: it has not become better
    by more than ``min_delta`` in ``times`` evaluations.
    """

    kind: Literal["threshold", "plateau"]
    metric: str
    threshold: float = 0.0
    lower_is_better: bool = False
    times: int = 1
    min_delta: float = 0.0


@dataclass(frozen=True)
class StagePlan:
    """What this module must know of a stage: at most so many ``steps``, its range of difficulty, its ways on."""

    name: str
    steps: int
    difficulty: tuple[float, float] = (0.0, 1.0)
    pacing: Pacing | None = None
    advance: Advance | None = None


@dataclass(frozen=True)
class StageState:
    """Where a run stands.

    ``step``: optimizer steps of the whole run. ``stage``: number of the stage, past the last when the run is done.
    ``step_in_stage``: steps of it. ``passes``: evaluations running that have passed its threshold; ``best`` and
    ``stale``: best value of a plateau's metric, and evaluations since. ``gate_passes``: likewise for the pacing's gate.
    ``competence``: what a gate or a ratchet has opened. ``performance``: the smoothed metric of ``source`` pacing.
    ``ended``: step at which every stage behind this one ended. ``drawn``: how far each source has been read.
    """

    step: int = 0
    stage: int = 0
    step_in_stage: int = 0
    passes: int = 0
    best: float | None = None
    stale: int = 0
    gate_passes: int = 0
    competence: float | None = None
    performance: float | None = None
    ended: tuple[int, ...] = ()
    drawn: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's metadata."""
        return asdict(self) | {"ended": list(self.ended), "drawn": {name: list(at) for name, at in self.drawn.items()}}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> StageState:
        """What ``to_json`` gave."""
        drawn = {name: (epoch, place) for name, (epoch, place) in saved["drawn"].items()}
        return cls(**{**saved, "ended": tuple(saved["ended"]), "drawn": drawn})


def competence(plan: StagePlan, state: StageState) -> float:
    """The share of the stage's range that is open at ``state``, from 0 to 1."""
    pacing = plan.pacing
    if pacing is None:
        return 1.0
    opened = pacing.start if state.competence is None else state.competence
    if pacing.kind == "gated":
        return min(1.0, opened)
    share = min(1.0, state.step_in_stage / max(1, pacing.over * plan.steps))
    if pacing.kind == "root":
        value = math.sqrt(share * (1 - pacing.start**2) + pacing.start**2)
    elif pacing.kind == "linear":
        value = pacing.start + (1 - pacing.start) * share
    else:
        # d_t = d_0 + (t / T)(d_max - d_0) · performance, which overshoots and turns back where it is not clipped
        value = pacing.start + (1 - pacing.start) * share * (state.performance or 0.0)
    value = min(1.0, max(pacing.start, value))
    return max(value, opened) if pacing.kind == "source" and pacing.ratchet else value


def open_difficulty(plan: StagePlan, state: StageState) -> tuple[float, float]:
    """The easiest and the hardest rows that a step may draw, as shares of all rows in order of difficulty."""
    low, high = plan.difficulty
    return low, low + (high - low) * competence(plan, state)


def after_step(plans: Sequence[StagePlan], state: StageState) -> StageState:
    """The state behind one more optimizer step; ``drawn`` is the caller's to renew."""
    plan = plans[state.stage]
    state = replace(state, step=state.step + 1, step_in_stage=state.step_in_stage + 1)
    if plan.pacing is not None and plan.pacing.kind == "source" and plan.pacing.ratchet:
        state = replace(state, competence=competence(plan, state))
    return _entered_next(state) if state.step_in_stage >= plan.steps else state


def after_evaluation(plans: Sequence[StagePlan], state: StageState, metrics: Mapping[str, float]) -> StageState:
    """The state behind an evaluation, which may open more of a stage, or end it.

    An evaluation at a stage's very end counts for nothing: the next stage has begun.
    """
    if is_done(plans, state) or state.step_in_stage == 0:
        return state
    plan = plans[state.stage]
    state = _paced(plan, state, metrics)
    if plan.advance is None or plan.advance.metric not in metrics:
        return state
    advance, value = plan.advance, metrics[plan.advance.metric]
    if advance.kind == "threshold":
        state = replace(state, passes=state.passes + 1 if _passes(advance, value) else 0)
        return _entered_next(state) if state.passes >= advance.times else state
    sign = -1.0 if advance.lower_is_better else 1.0
    if state.best is None or sign * (value - state.best) > advance.min_delta:
        return replace(state, best=value, stale=0)
    state = replace(state, stale=state.stale + 1)
    return _entered_next(state) if state.stale >= advance.times else state


def is_done(plans: Sequence[StagePlan], state: StageState) -> bool:
    """Whether every stage has ended."""
    return state.stage >= len(plans)


def schedule_position(plans: Sequence[StagePlan], state: StageState) -> int:
    """Steps of the whole run as planned that lie behind: where stages end early it is ahead of the steps done."""
    return sum(plan.steps for plan in plans[: state.stage]) + state.step_in_stage


def _passes(gate: Advance | Pacing, value: float) -> bool:
    return value <= gate.threshold if gate.lower_is_better else value >= gate.threshold


def _paced(plan: StagePlan, state: StageState, metrics: Mapping[str, float]) -> StageState:
    pacing = plan.pacing
    if pacing is None or pacing.metric is None or pacing.metric not in metrics:
        return state
    value = metrics[pacing.metric]
    if pacing.kind == "source":
        performance = pacing.threshold / max(value, 1e-12) if pacing.lower_is_better else value / pacing.threshold
        old = state.performance
        smoothed = performance if old is None else pacing.smoothing * old + (1 - pacing.smoothing) * performance
        return replace(state, performance=smoothed)
    if pacing.kind != "gated":
        return state
    passes = state.gate_passes + 1 if _passes(pacing, value) else 0
    if passes < pacing.times:
        return replace(state, gate_passes=passes)
    return replace(state, gate_passes=0, competence=min(1.0, competence(plan, state) + pacing.rise))


def _entered_next(state: StageState) -> StageState:
    """At the first step of the next stage; how far sources have been read stays."""
    return StageState(step=state.step, stage=state.stage + 1, ended=(*state.ended, state.step), drawn=state.drawn)
