"""What a reward actor does: score completions with the recipe's reward."""

from __future__ import annotations

import sys
from typing import Any

import torch

from jobs.recipe import Recipe
from jobs.task_source import load_recipe_tasks
from mmada.training.reward_sources import build_reward
from mmada.training.rewards import RewardResult, RewardSample


class RewardWorker:
    """An actor's content; ``score`` is one call of the pool."""

    def __init__(self, recipe: dict[str, Any], folder: str) -> None:
        """``folder``: where reward functions may lie beside the installed packages."""
        torch.set_num_threads(1)
        sys.path.insert(0, folder)
        self.recipe = Recipe.model_validate(recipe)
        assert self.recipe.reward is not None
        self.tasks = load_recipe_tasks(self.recipe)
        parts = [part.model_dump() for part in self.recipe.reward.parts]
        # An endpoint is given up a little before the actor that asks it counts as hung.
        own = self.recipe.reward
        self.reward = build_reward(parts, self.tasks, timeout=0.9 * own.timeout, retries=own.retries)

    def score(self, asked: list[tuple[int, str, bool]]) -> list[RewardResult]:
        """Score completions: (number of the problem among those to learn from, text, whether it ended by itself)."""
        samples = [
            RewardSample(item=self.tasks.train[index], completion=text, is_ended=is_ended)
            for index, text, is_ended in asked
        ]
        return self.reward.score(samples)
