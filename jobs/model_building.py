"""From a recipe's ``model`` section to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from jobs.entropy_model import load_entropy_model, with_entropy_model
from jobs.recipe import Recipe
from mmada.config import MMaDAConfig
from mmada.data import load_tokenizer
from mmada.presets import build_config

if TYPE_CHECKING:
    from mmada.model import MMaDAForCausalLM
    from mmada.pretrained import TrainableModel

Model = TypeVar("Model", bound="TrainableModel")


def model_config(recipe: Recipe) -> MMaDAConfig:
    """The architecture that the recipe asks for. Raises ValueError naming the field."""
    overrides = recipe.model.overrides()
    overrides.pop("attn_implementation", None)
    overrides = with_entropy_model(recipe, overrides)
    return build_config(recipe.model.preset, **{**special_ids(recipe), **overrides})


def special_ids(recipe: Recipe) -> dict[str, int | None]:
    """Padding, begin and end as a tokenizer other than our own has them; the config's defaults are our own's."""
    if recipe.data.tokenizer == "bytes":
        return {}
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def build_model(recipe: Recipe, config: MMaDAConfig | None = None) -> MMaDAForCausalLM:
    """A new language model in float32, its weights a function of ``run.seed`` alone.

    ``config`` in place of the recipe's own. The weights of ``model.entropy_model`` are the trained ones.
    """
    from mmada.model import MMaDAForCausalLM

    return build_model_of(MMaDAForCausalLM, recipe, config)


def build_model_of(kind: type[Model], recipe: Recipe, config: MMaDAConfig | None = None) -> Model:
    """``build_model`` with a head of another kind on the same trunk."""
    torch.manual_seed(recipe.run.seed)
    attention = recipe.model.overrides().get("attn_implementation", "sdpa")
    config = config or model_config(recipe)
    model = kind._from_config(config, attn_implementation=attention, dtype=torch.float32)
    if recipe.model.entropy_model is not None and config.patches.needs_entropy_model:
        load_entropy_model(model, recipe.model.entropy_model)
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model
