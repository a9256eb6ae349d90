"""How many trajectories ``mmada ppo`` learns from at a time."""

from __future__ import annotations

from jobs.recipe_schema_rl import PPOSection
from mmada.training.algorithms import ALGORITHMS


def minibatch_size(ppo: PPOSection) -> int:
    """Trajectories of one optimizer step: all of a batch where the algorithm takes one step alone."""
    single = ALGORITHMS[ppo.algorithm].single_update
    return ppo.prompts_per_iteration * ppo.samples_per_prompt if single else ppo.minibatch
