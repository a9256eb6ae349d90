"""What must fit together in a recipe for ``mmada ppo``. Nothing here writes to disk; all raises RecipeError."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jobs.checkpoint_folder import holds_reward_model, model_folder
from jobs.recipe import Recipe, RecipeError
from jobs.recipe_checks import (
    check_experts,
    check_gpus,
    check_patches,
    check_vocabulary,
    check_workers,
    checked_config,
    divisors,
)
from jobs.recipe_schema import AUTO
from jobs.recipe_schema_rl import PPOSection, RewardSection
from jobs.rl.policy_source import check_start_from
from jobs.task_source import load_recipe_tasks
from jobs.wording import listed
from mmada.config import MMaDAConfig


def completed(recipe: Recipe) -> Recipe:
    """The recipe with the reward that it does not name: how well the problems are solved.

    Raises RecipeError where it has nothing to sample or no section ``ppo``.
    """
    if recipe.ppo is None:
        raise RecipeError("ppo.iterations is missing; the recipe needs a section ppo, as in jobs/recipes/ppo.yaml")
    if recipe.tasks is None:
        raise RecipeError(
            "tasks.family is missing; name a task family of reasoning-gym, such as tasks.family=chain_sum"
        )
    if recipe.data.source in ("files", "hub"):
        raise RecipeError(
            f"data.source={recipe.data.source} has no part in `mmada ppo`, whose problems are those of the section "
            "tasks; leave it out"
        )
    if recipe.train.micro_batch == AUTO:
        raise RecipeError(
            "train.micro_batch=auto has no part in `mmada ppo`, whose passes go by ppo.micro_batch; leave it out "
            "(train.micro_batch=null)"
        )
    if recipe.train.objective != "language_model":
        raise RecipeError(
            f"train.objective={recipe.train.objective} has no part in `mmada ppo`; leave it out, and train a reward "
            "model with `mmada train`"
        )
    return recipe if recipe.reward is not None else recipe.model_copy(update={"reward": RewardSection()})


def check_ppo(recipe: Recipe) -> None:
    """Raise RecipeError unless the sections, the model, the tasks and this machine go together.

    DataError and ClusterError name what cannot be read: tasks, reward functions, a policy to start from.
    """
    assert recipe.ppo is not None
    check_minibatches(recipe, recipe.ppo)
    check_algorithm(recipe.ppo)
    check_reward(recipe)
    check_workers(recipe)
    config = checked_config(recipe)
    check_experts(recipe, config)
    check_vocabulary(recipe, config)
    check_patches(recipe, config)
    check_gpus(recipe)
    check_threshold(recipe, config)
    check_start_from(recipe)
    check_prompts(recipe, recipe.ppo, config)


def check_minibatches(recipe: Recipe, ppo: PPOSection) -> None:
    """Minibatches are no larger than a batch, and split evenly over workers and passes."""
    from mmada.training.algorithms import ALGORITHMS

    trajectories, workers = ppo.prompts_per_iteration * ppo.samples_per_prompt, recipe.cluster.workers
    size, key = ppo.minibatch, "ppo.minibatch"
    if ALGORITHMS[ppo.algorithm].single_update:
        size, key = trajectories, "ppo.prompts_per_iteration · ppo.samples_per_prompt"
    if size > trajectories:
        raise RecipeError(
            f"ppo.minibatch={size} is more than the {trajectories} trajectories of a batch "
            f"(ppo.prompts_per_iteration={ppo.prompts_per_iteration} times "
            f"ppo.samples_per_prompt={ppo.samples_per_prompt}); use at most {trajectories}"
        )
    if size % workers:
        above = (size // workers + 1) * workers
        raise RecipeError(f"{key}={size} is not divisible by cluster.workers={workers}; use {above}")
    share = size // workers
    if ppo.micro_batch is not None and share % ppo.micro_batch:
        raise RecipeError(
            f"ppo.micro_batch={ppo.micro_batch} does not divide the {share} trajectories of a worker "
            f"({key}={size} over cluster.workers={workers}); use {listed(divisors(share))}"
        )


def check_algorithm(ppo: PPOSection) -> None:
    """The algorithm has what it compares, and takes the steps that it is asked for."""
    from mmada.training.algorithms import ALGORITHMS

    algorithm = ALGORITHMS[ppo.algorithm]
    if algorithm.uses_groups and ppo.samples_per_prompt < 2:
        raise RecipeError(
            f"ppo.samples_per_prompt={ppo.samples_per_prompt} leaves ppo.algorithm={ppo.algorithm} nothing to compare; "
            "use 2 or more"
        )
    if ppo.warmup_iterations > ppo.iterations:
        raise RecipeError(
            f"ppo.warmup_iterations={ppo.warmup_iterations} is more than ppo.iterations={ppo.iterations}; use less"
        )
    if algorithm.single_update and ppo.epochs not in (None, 1):
        raise RecipeError(
            f"ppo.epochs={ppo.epochs} does not go with ppo.algorithm={ppo.algorithm}, which takes one step on a batch; "
            "leave it out, or use ppo.algorithm=ppo"
        )
    if ppo.algorithm == "reinforce" and ppo.max_staleness:
        raise RecipeError(
            f"ppo.max_staleness={ppo.max_staleness} does not go with ppo.algorithm=reinforce, which knows no "
            "ratio to the version that sampled; use ppo.max_staleness=0, or another algorithm"
        )
    if ppo.kl_target is not None and not ppo.kl_coefficient:
        raise RecipeError(
            f"ppo.kl_target={ppo.kl_target:g} has no coefficient to adapt (ppo.kl_coefficient=0); use a "
            "ppo.kl_coefficient above 0 to begin with"
        )
    if ppo.kl_target is not None and algorithm.kl_in == "loss":
        raise RecipeError(
            f"ppo.kl_target={ppo.kl_target:g} has no meaning for ppo.algorithm={ppo.algorithm}, whose divergence is in "
            "the loss; leave it out"
        )


def check_reward(recipe: Recipe) -> None:
    """Every part of the reward can be had. Functions may lie in modules of the working directory."""
    from mmada.training.reward_sources import check_parts

    assert recipe.reward is not None
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    parts = [part.model_dump() for part in recipe.reward.parts]
    for number, part in enumerate(parts):
        if part["kind"] == "model" and part["name"] is not None:
            field, name = f"reward.parts[{number}].name", part["name"]
            part["name"] = str(model_folder(name, field))
            if not holds_reward_model(Path(part["name"])):
                raise RecipeError(
                    f"{field}={name} holds no reward model; give one that `mmada train reward-model` left"
                )
    check_parts(parts)


def check_threshold(recipe: Recipe, config: MMaDAConfig) -> None:
    """Byte patches know their threshold: there is no text here to find it from."""
    patches = config.patches
    is_open = patches.needs_entropy_model and patches.threshold is None
    if is_open and (recipe.ppo is None or recipe.ppo.start_from is None):
        raise RecipeError(
            f"model.patches.threshold=null leaves patches.mode={patches.mode} without a threshold, which training on "
            "text would find; set it, or begin with a trained model (ppo.start_from)"
        )


def check_prompts(recipe: Recipe, ppo: PPOSection, config: MMaDAConfig) -> None:
    """Every problem with its longest completion has room in the model's positions."""
    from mmada.data import load_tokenizer
    from mmada.data.task_rows import prompt_ids

    tokenizer, tasks = load_tokenizer(recipe.data.tokenizer), load_recipe_tasks(recipe)
    longest = max(len(prompt_ids(tokenizer, item.prompt)) for item in (*tasks.train, *tasks.held_out))
    if longest + ppo.max_new_tokens > config.max_position_embeddings:
        raise RecipeError(
            f"ppo.max_new_tokens={ppo.max_new_tokens} after a prompt of {longest} tokens is more than "
            f"model.max_position_embeddings={config.max_position_embeddings}; use shorter ones, easier tasks, or "
            f"model.max_position_embeddings={longest + ppo.max_new_tokens}"
        )
