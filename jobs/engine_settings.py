"""A recipe's share of what the engine is told, for each kind of learning."""

from __future__ import annotations

from typing import Any

from cluster.engine import EngineSettings
from jobs.minibatch import minibatch_size
from jobs.recipe import Recipe
from jobs.stage_runner import factors, freezable
from mmada.actor_critic import CRITIC, ActorCritic
from mmada.nn.experts import expert_ffn_sorted
from mmada.pretrained import TrainableModel


def training_settings(recipe: Recipe, model: TrainableModel) -> EngineSettings:
    """For ``mmada train``."""
    train = recipe.train
    return _settings(
        recipe,
        model,
        recipe.rows_per_worker,
        recipe.micro_batch,
        learning_rate=train.learning_rate,
        epsilon=train.epsilon,
        weight_decay=train.weight_decay,
        learning_rate_factors=factors(recipe),
        freezable=freezable(recipe),
    )


def policy_settings(recipe: Recipe, model: ActorCritic) -> EngineSettings:
    """For ``mmada ppo``."""
    ppo = recipe.ppo
    assert ppo is not None
    rows = minibatch_size(ppo) // recipe.cluster.workers
    return _settings(
        recipe,
        model,
        rows,
        ppo.micro_batch or rows,
        learning_rate=ppo.learning_rate,
        epsilon=ppo.adam_epsilon,
        weight_decay=ppo.weight_decay,
        learning_rate_factors=((CRITIC, ppo.value_learning_rate_factor),),
    )


def _settings(
    recipe: Recipe, model: TrainableModel | ActorCritic, rows: int, micro_batch: int, **optimizer: Any
) -> EngineSettings:
    """``rows``: of one optimizer step on one worker."""
    train, cluster = recipe.train, recipe.cluster
    return EngineSettings(
        zero_stage=train.zero_stage,
        precision=train.precision,
        micro_batch=micro_batch,
        accumulation=rows // micro_batch,
        clip_grad_norm=train.clip_grad_norm,
        betas=(train.beta1, train.beta2),
        offload_optimizer=train.offload_optimizer,
        expert_parallel=cluster.expert_parallel,
        expert_layout=model.expert_parallel_layout(),
        gathered_whole=model.gathered_whole,
        expert_ffn=expert_ffn_sorted,
        **optimizer,
    )
