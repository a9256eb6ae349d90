"""One batch of experience: what rollout and reward actors made, as learners take it.

# N trajectories, S tokens of a row (prompt, completion, padding), C completion tokens
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jobs.rl.messages import Trajectory


@dataclass
class Experience:
    """Rows in the order of their names, whatever order they came in.

    ``names``: (slot, sample) of each trajectory. ``groups_N``: its slot, which it shares with the other samples of its
    prompt. ``versions_N``: the policy that sampled it. ``is_ended_N``: it ended by itself. ``logprobs_NC``: as sampled;
    0 behind the row's own tokens, as are the reference's (None where there is none). ``metrics``: of the making.
    """

    iteration: int
    generation: int
    names: list[tuple[int, int]]
    input_ids_NS: np.ndarray
    prompt_lengths_N: np.ndarray
    completion_lengths_N: np.ndarray
    logprobs_NC: np.ndarray
    reference_logprobs_NC: np.ndarray | None
    scores_N: np.ndarray
    groups_N: np.ndarray
    versions_N: np.ndarray
    is_ended_N: np.ndarray
    metrics: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_completion_tokens(self) -> int:
        """Of all completions together."""
        return int(self.completion_lengths_N.sum())


def collect(
    iteration: int,
    generation: int,
    scored: list[tuple[Trajectory, float]],
    padding: int,
    metrics: dict[str, float],
) -> Experience:
    """Trajectories with their scores as one batch; ``padding``: the token that fills rows up."""
    scored = sorted(scored, key=lambda pair: (pair[0].slot, pair[0].sample))
    trajectories = [trajectory for trajectory, _ in scored]
    rows = [[*each.prompt, *each.completion.ids] for each in trajectories]
    has_reference = all(each.reference_logprobs for each in trajectories)
    return Experience(
        iteration=iteration,
        generation=generation,
        names=[(each.slot, each.sample) for each in trajectories],
        input_ids_NS=_padded(rows, padding, np.int64),
        prompt_lengths_N=np.array([len(each.prompt) for each in trajectories]),
        completion_lengths_N=np.array([len(each.completion.ids) for each in trajectories]),
        logprobs_NC=_padded([each.completion.logprobs for each in trajectories], 0.0, np.float32),
        reference_logprobs_NC=_padded([each.reference_logprobs for each in trajectories], 0.0, np.float32)
        if has_reference
        else None,
        scores_N=np.array([score for _, score in scored], np.float64),
        groups_N=np.array([each.slot for each in trajectories]),
        versions_N=np.array([each.version for each in trajectories]),
        is_ended_N=np.array([each.completion.finish != "length" for each in trajectories]),
        metrics=metrics,
    )


def _padded(rows: list[list], fill: float, dtype: type) -> np.ndarray:
    padded: np.ndarray = np.full((len(rows), max(map(len, rows))), fill, dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
