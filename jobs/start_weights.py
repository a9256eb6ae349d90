"""``train.start_from`` and ``ppo.start_from``: the weights that a run begins with, from a model trained before.

The trunk must be there tensor by tensor, in the same shapes. Heads are taken where the saved model has them, and are
new where it does not: so a reward model begins with a language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cluster.errors import ClusterError
from jobs.checkpoint_folder import model_folder
from jobs.recipe import RecipeError

if TYPE_CHECKING:
    from mmada.config import MMaDAConfig
    from mmada.pretrained import TrainableModel

_KEY = "train.start_from"
_TRUNK = "model."
_TIED = ("model.embed_tokens.weight", "lm_head.weight")


def check_start_weights(name: str, field: str, kind: type[TrainableModel], config: MMaDAConfig) -> None:
    """Raise RecipeError unless ``field=name`` has what a model of this kind needs; reads no weights."""
    folder = start_folder(name, field)
    found: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}
    if (mistake := mismatch(wanted, found)) is not None:
        raise RecipeError(f"{field}={name} {mistake.replace(_KEY, field)}")


def start_folder(name: str, field: str = _KEY) -> Path:
    """The Hugging Face folder that is meant. Raises RecipeError naming the recipe's key."""
    try:
        return model_folder(str(Path(name).expanduser()), field)
    except ClusterError as error:
        raise RecipeError(str(error)) from error
    except OSError as error:
        raise RecipeError(f"{field}={name} cannot be read ({error.strerror}); give another folder") from error


def mismatch(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with the shapes that were found, or None."""
    remedy = f"use the model section that it was trained with, or leave {_KEY} out"
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name] != found[name]:
            return f"has {name} of shape {found[name]}, and this recipe's model needs {wanted[name]}; {remedy}"
    trunk = {name for name in wanted if name.startswith(_TRUNK)}
    if missing := sorted(name for name in trunk - found.keys() if not is_tied_copy(name, found)):
        return f"lacks {missing[0]}, which this recipe's model has; {remedy}"
    if unknown := sorted(name for name in found if name.startswith(_TRUNK) and name not in trunk):
        return f"has {unknown[0]}, which this recipe's model lacks; {remedy}"
    return None


def is_tied_copy(name: str, found: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tensor is left out of saved models because it is another one: a head tied to its embeddings."""
    return name.endswith(_TIED[1]) and f"{name.removesuffix(_TIED[1])}{_TIED[0]}" in found


@torch.no_grad()
def load_start(model: TrainableModel, folder: Path) -> list[str]:
    """Give a new model the saved weights; what there is to say. Raises ClusterError for weights that do not fit."""
    tensors = {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    own = model.state_dict()
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (own, tensors)]
    if (mistake := mismatch(*shapes)) is not None:
        raise ClusterError(f"train.start_from={folder} {mistake}")
    is_tied = model.config.tie_word_embeddings and _TIED[1] in own
    if is_tied and _TIED[1] in tensors and not torch.equal(tensors[_TIED[0]], tensors[_TIED[1]]):
        raise ClusterError(
            f"train.start_from={folder} has a head apart from its embeddings; use model.tie_word_embeddings=false"
        )
    for name in own.keys() & tensors.keys():
        own[name].copy_(tensors[name])
    new = sorted({name.partition(".")[0] for name in own.keys() - tensors.keys()} - ({"lm_head"} if is_tied else set()))
    return [f"starting from the weights in {folder}" + (f", with new {' and '.join(new)}" if new else "")]
