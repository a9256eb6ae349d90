"""``safety``: the model stays near one that is trusted.

With ``objectives.safety_limit`` the price of the divergence is no weight but a multiplier that follows the limit
(``jobs.combination``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jobs.checkpoint_folder import holds_reward_model
from jobs.objectives.objective import Place
from jobs.objectives.terms.term import Term, targets_of
from jobs.recipe import Recipe
from jobs.recipe_schema_stages import ObjectivesSection
from jobs.start_weights import start_folder
from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM
from mmada.output import MMaDAOutput
from mmada.training.objectives.safety import divergence, squared_weights

_KEY = "objectives.safety_reference"


class Safety(Term):
    """The divergence from ``objectives.safety_reference``, nats per target; the source's own term is reported."""

    def __init__(self, recipe: Recipe, model: MMaDAForCausalLM, place: Place, kept: Mapping[str, Any]) -> None:
        super().__init__(recipe, model, place, kept)
        assert self.settings.safety_reference is not None
        folder = start_folder(self.settings.safety_reference, _KEY)
        reference = MMaDAForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.reference = reference.to(place.device).eval().requires_grad_(False)

    @classmethod
    def refusal(cls, settings: ObjectivesSection, config: MMaDAConfig) -> str | None:
        """Without a language model of the same vocabulary. Raises RecipeError where the folder holds no model."""
        if settings.safety_reference is None:
            return f"stays near a model that is not named; set {_KEY} to one"
        folder = start_folder(settings.safety_reference, _KEY)
        if holds_reward_model(folder):
            return (
                f"stays near a language model, and {_KEY}={settings.safety_reference} holds a reward model; set another"
            )
        vocabulary = MMaDAConfig.from_pretrained(folder).vocab_size
        if vocabulary != config.vocab_size:
            return (
                f"compares {config.vocab_size} tokens with the {vocabulary} of {_KEY}={settings.safety_reference}; "
                "set a model with the same tokenizer"
            )
        return None

    def of(
        self, output: MMaDAOutput, batch: dict[str, Tensor], share: Tensor, seen: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Term``; metrics ``reference_divergence`` and, but at ZeRO 3, ``squared_weights``."""
        with torch.no_grad():
            inputs = {name: value for name, value in batch.items() if name not in ("shift_labels", "sample_ids")}
            reference = self.reference(**inputs, use_cache=False)
        logits_NV, _ = targets_of(output, batch)
        loss = divergence(logits_NV, targets_of(reference, batch)[0]) / share
        metrics = {"reference_divergence": loss.detach()}
        if self.recipe.train.zero_stage < 3:  # where no worker has a weight whole
            metrics["squared_weights"] = self._squared_weights()
        return loss, metrics

    def _squared_weights(self) -> Tensor:
        """Of the whole model, in the mean over workers: each has its share of experts that are split."""
        split: list[Tensor] = []
        common: list[Tensor] = []
        for parameter in self.model.parameters():
            (split if hasattr(parameter, "group_name") else common).append(parameter)
        total = squared_weights(common)
        return total + self.recipe.cluster.expert_parallel * squared_weights(split) if split else total
