"""What rollout actors are asked and answer. Apart from what answers, so that nobody loads a model to read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmada.generate import Completion


@dataclass
class Request:
    """Sample a prompt: which place in the batch it has, its tokens, and a seed for every sample wanted."""

    iteration: int
    slot: int
    prompt: list[int]
    seeds: list[int]


@dataclass
class Trajectory:
    """One sample: its name, its tokens and their log-probabilities under the version that sampled it, and the
    reference's (empty where none is asked for)."""

    iteration: int
    slot: int
    sample: int
    version: int
    prompt: list[int]
    completion: Completion
    text: str
    reference_logprobs: list[float]


@dataclass
class Sampled:
    """What a call of ``sample`` gives: its trajectories, and the seconds spent on sampling and on the reference.

    ``trajectories`` is None where the actor could not fetch the weights that it should sample with.
    """

    trajectories: list[Trajectory] | None
    sampling_seconds: float = 0.0
    reference_seconds: float = 0.0


@dataclass
class Loaded:
    """What became of published weights: how far this actor's log-probabilities of the probe are from the learners'
    (None without a probe, or where the weights were lost with their publisher), or what is wrong with them."""

    generation: int
    gap: float | None = None
    problem: str | None = None


@dataclass
class Probe:
    """Completions and the log-probabilities that the learners give them at the version that they publish."""

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: list[list[float]]


@dataclass
class Evaluated:
    """Greedy answers to held-out problems: each one's number, and whether it is solved; none where the actor has
    another ``version`` than was asked for (None: no weights yet)."""

    version: int | None
    answers: list[tuple[int, bool]]
