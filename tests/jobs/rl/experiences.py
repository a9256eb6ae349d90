"""Made-up experience for tests of learning: ragged prompts and completions, with log-probabilities of a real policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.recipe import Recipe, load_recipe
from jobs.rl.experience import Experience
from mmada.actor_critic import ActorCritic


def small_recipe(run_dir: Path, **overrides: Any) -> Recipe:
    """``ppo-debug`` with one thread."""
    keys = {"run.dir": str(run_dir), "run.name": "run", "cluster.threads_per_worker": 1, **overrides}
    return load_recipe("ppo-debug", [f"{key}={value}" for key, value in keys.items()])


def make_experience(
    model: ActorCritic, iteration: int, *, groups: int = 5, samples: int = 3, version: int | None = None
) -> Experience:
    """A batch whose recorded log-probabilities are ``model``'s own; scores and the reference's are drawn."""
    generator = np.random.default_rng([7, iteration])
    num_rows = groups * samples
    prompt_lengths = generator.integers(2, 9, size=groups).repeat(samples)
    completion_lengths = generator.integers(1, 7, size=num_rows)
    width = int((prompt_lengths + completion_lengths).max())
    ids = generator.integers(8, 264, size=(num_rows, width))
    column_S = np.arange(width)
    ids[column_S >= (prompt_lengths + completion_lengths)[:, None]] = 0
    with torch.no_grad():
        judged = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy((column_S < (prompt_lengths + completion_lengths)[:, None]).astype(int)),
            prompt_lengths=torch.from_numpy(prompt_lengths),
            num_completion_tokens=int(completion_lengths.max()),
            temperature=1.0,
        )
    behind = np.arange(int(completion_lengths.max())) >= completion_lengths[:, None]
    logprobs = judged.logprobs_BC.numpy().astype(np.float32)
    logprobs[behind] = 0
    reference = (logprobs + generator.normal(0, 0.2, size=logprobs.shape)).astype(np.float32)
    reference[behind] = 0
    return Experience(
        iteration=iteration,
        generation=1,
        names=[(row // samples, row % samples) for row in range(num_rows)],
        input_ids_NS=ids,
        prompt_lengths_N=prompt_lengths,
        completion_lengths_N=completion_lengths,
        logprobs_NC=logprobs,
        reference_logprobs_NC=reference,
        scores_N=generator.normal(0, 1, size=num_rows),
        groups_N=np.arange(groups).repeat(samples),
        versions_N=np.full(num_rows, iteration if version is None else version),
        is_ended_N=generator.random(num_rows) < 0.7,
    )
