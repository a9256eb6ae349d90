"""Training in one process, without Ray, DeepSpeed or torch.distributed.

The whole stack is measured against it, and small studies are run with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cluster.parameter_groups import parameter_groups
from jobs.model_building import build_model
from jobs.recipe import Recipe
from mmada.data import global_batch_indices, open_prepared, sample_ids
from mmada.training.schedules import warmup_cosine


class BareLoop:
    """One process, one PyTorch AdamW, the recipe's model and schedule.

    ``batches(step)`` gives the batch of a step, ``input_ids`` and ``shift_labels`` at least.
    """

    def __init__(self, recipe: Recipe, batches: Callable[[int], dict[str, Tensor]]) -> None:
        self.recipe, self.batches, train = recipe, batches, recipe.train
        self.model = build_model(recipe).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, train.weight_decay),
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            eps=train.epsilon,
        )

    def step(self, step: int) -> tuple[float, float]:
        """One optimizer step; language-model loss in nats per token, and the gradient's norm before clipping."""
        recipe, train = self.recipe, self.recipe.train
        batch = self.batches(step)
        output = self.model(
            **batch,
            sample_ids=torch.from_numpy(sample_ids(recipe.run.seed, step, train.global_batch)),
            num_items_in_batch=(batch["shift_labels"] != -100).sum(),
            use_cache=False,
        )
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = warmup_cosine(
                step,
                peak=train.learning_rate,
                steps=train.steps,
                warmup_steps=train.warmup_steps,
                min_ratio=train.min_learning_rate_ratio,
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if output.expert_load is not None:
            self.model.update_router_bias(output.expert_load)
        return output.lm_loss.item(), norm.item()


def text_batches(recipe: Recipe, prepared: Path) -> Callable[[int], dict[str, Tensor]]:
    """The global batches of ``mmada train`` from prepared text."""
    rows = open_prepared(prepared).train.rows(recipe.train.sequence_length)

    def batch(step: int) -> dict[str, Tensor]:
        return rows.batch(global_batch_indices(recipe.run.seed, step, recipe.train.global_batch, len(rows)))

    return batch
