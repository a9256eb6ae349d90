"""The same training without Ray, DeepSpeed or torch.distributed: what the whole stack is measured against."""

from __future__ import annotations

from pathlib import Path

import torch

from cluster.engine import parameter_groups
from jobs.model_building import build_model
from jobs.recipe import Recipe
from mmada.data import global_batch_indices, open_prepared, sample_ids
from mmada.training.schedules import warmup_cosine


class BareLoop:
    """One process, one PyTorch AdamW, the recipe's model, batches and schedule."""

    def __init__(self, recipe: Recipe, prepared: Path) -> None:
        self.recipe, train = recipe, recipe.train
        self.rows = open_prepared(prepared).train.rows(train.sequence_length)
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
        batch = self.rows.batch(global_batch_indices(recipe.run.seed, step, train.global_batch, len(self.rows)))
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
