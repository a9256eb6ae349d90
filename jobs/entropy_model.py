"""The small byte model that a recipe names as ``model.entropy_model``: where a patch of bytes ends is asked of it.

It was trained before, by a recipe of its own (``entropy-model``). Its config becomes part of the new model's, its
weights a part of the new model that stays as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError
from jobs.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from mmada.data import PackedRows
    from mmada.pretrained import TrainableModel

# Training text that a threshold is found on, and how much of it goes through the entropy model at once.
SAMPLE_BYTES, PIECE_BYTES = 1 << 17, 1 << 14


def with_entropy_model(recipe: Recipe, overrides: dict[str, Any]) -> dict[str, Any]:
    """The model's fields with ``patches.entropy_model`` filled in, where the recipe groups bytes by entropy.

    Raises RecipeError where a model of bytes is needed and not there, or there and not needed.
    """
    from mmada.config_parts import ENTROPY_MODES

    folder, patches = recipe.model.entropy_model, overrides.get("patches")
    mode = patches.get("mode", "none") if isinstance(patches, dict) else "none"
    if mode in ENTROPY_MODES and folder is None:
        raise RecipeError(
            f"model.entropy_model=null leaves model.patches.mode={mode} nothing to ask; give the run's folder of a "
            "small model of bytes (mmada train entropy-model), or use mode static or space"
        )
    if folder is None:
        return overrides
    if mode not in ENTROPY_MODES or patches is None:
        raise RecipeError(
            f"model.entropy_model={folder} has no part in model.patches.mode={mode}; leave it out, or use mode "
            f"{', '.join(ENTROPY_MODES)}"
        )
    return {**overrides, "patches": {**patches, "entropy_model": read_config(folder)}}


def read_config(folder: str) -> dict[str, Any]:
    """The architecture of the model in a checkpoint, a run's folder or a folder of its own."""
    from mmada.config import MMaDAConfig
    from mmada.data import load_tokenizer
    from mmada.tokenizer import ByteTokenizer

    model = entropy_model_folder(folder)
    if not isinstance(load_tokenizer(str(model)), ByteTokenizer):
        raise RecipeError(f"model.entropy_model={folder} is no model of bytes; use one with data.tokenizer=bytes")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    known = MMaDAConfig.architecture_fields() - {"attn_implementation"}
    return {name: value for name, value in config.items() if name in known}


def entropy_model_folder(folder: str) -> Path:
    """The Hugging Face folder that is meant. Raises RecipeError naming the recipe's key."""
    from jobs.checkpoint_folder import model_folder

    try:
        return model_folder(str(Path(folder).expanduser()))
    except (ClusterError, OSError) as error:
        raise RecipeError(f"model.entropy_model={folder} cannot be used: {error}") from error


def load_entropy_model(model: TrainableModel, folder: str) -> None:
    """Give the new model the trained weights."""
    from transformers.utils import logging

    from mmada.model import MMaDAForCausalLM

    assert model.model.patches is not None and model.model.patches.entropy_model is not None
    logging.disable_progress_bar()
    trained = MMaDAForCausalLM.from_pretrained(entropy_model_folder(folder), dtype=model.dtype)
    model.model.patches.entropy_model.load_state_dict(trained.state_dict())


def settle_threshold(model: TrainableModel, rows: PackedRows, saved: Path | None) -> list[str]:
    """Find the threshold that gives patches of ``patches.size`` bytes on a sample of the training rows, if it is null.

    ``saved``: the model's folder in the checkpoint that the run goes on from, which knows it already. Returns what
    there is to say. Raises ClusterError where no threshold gives that size.
    """
    settings = model.config.patches
    if not settings.needs_entropy_model or settings.threshold is not None:
        return []
    if saved is not None:
        return settle_saved_threshold(model, saved)
    from mmada.nn.patches.boundaries import mean_patch_size, threshold_for_size

    index, entropy = sample_entropies(model, rows)
    try:
        settings.threshold = threshold_for_size(settings, index, entropy)
    except ValueError as error:
        raise ClusterError(f"model.{error}") from error
    size = mean_patch_size(settings, index, entropy)
    return [f"model.patches.threshold={settings.threshold:.6g} gives {size:.2f} bytes per patch"]


def settle_saved_threshold(model: TrainableModel, saved: Path | None) -> list[str]:
    """Take an open threshold from the config of a saved model. Raises ClusterError where none is given."""
    settings = model.config.patches
    if settings.needs_entropy_model and settings.threshold is None:
        if saved is None:
            raise ClusterError(
                "model.patches.threshold=null can be found on text alone, and this recipe learns from none; set it, "
                "or train.start_from, whose threshold is then taken"
            )
        settings.threshold = json.loads((saved / "config.json").read_text(encoding="utf-8"))["patches"]["threshold"]
    return []


def sample_entropies(model: TrainableModel, rows: PackedRows) -> tuple[Tensor, Tensor]:
    """Number in its document, and entropy after it, of each byte in rows spread evenly over the text; (rows, T)."""
    import numpy as np
    import torch

    from mmada.nn.patches.boundaries import entropies

    assert model.model.patches is not None and model.model.patches.entropy_model is not None
    entropy_model, length = model.model.patches.entropy_model, rows.sequence_length
    whole = max(1, len(rows) - 1)  # the last row is filled up with padding
    chosen = np.unique(np.linspace(0, whole - 1, max(1, SAMPLE_BYTES // length)).astype(np.int64))
    per_pass, index, entropy = max(1, PIECE_BYTES // length), [], []
    for first in range(0, len(chosen), per_pass):
        batch = rows.batch(chosen[first : first + per_pass])
        ids, positions = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
        with torch.no_grad():
            logits = entropy_model(input_ids=ids, position_ids=positions, use_cache=False).logits
        index.append(positions)
        entropy.append(entropies(logits))
    return torch.cat(index), torch.cat(entropy)
