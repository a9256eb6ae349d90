"""From what a user types to a checkpoint's folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cluster.checkpoints import CheckpointStore
from cluster.errors import ClusterError
from jobs.recipe_schema import RESOLVED_RECIPE


def model_folder(checkpoint: str, field: str = "checkpoint") -> Path:
    """The Hugging Face folder of a checkpoint, a run (its newest good checkpoint) or an exported model.

    Raises ClusterError, naming the value as that of ``field`` and a remedy, where there is none; a damaged checkpoint
    is refused by name.
    """
    folder, named = Path(checkpoint), f"{field}={checkpoint}"
    if not folder.is_dir():
        raise ClusterError(f"{named} is not a folder; give a checkpoint, a run's folder or a saved model")
    if (folder / "checkpoints").is_dir():
        damaged: list[str] = []
        newest = CheckpointStore(folder / "checkpoints").newest_good(lambda d: damaged.append(str(d)))
        for line in damaged:
            print(f"mmada: {line}; taking the one before", file=sys.stderr)
        if newest is None:
            reason = damaged[0] if damaged else "the run saved none"
            raise ClusterError(f"{named} holds no good checkpoint ({reason}); train it further first")
        return newest / "model"
    if (folder / "MANIFEST.json").exists() or (folder / "engine").is_dir():
        CheckpointStore(folder.parent).verify(folder)
        return folder / "model"
    config = folder / "config.json"
    if not config.exists():
        raise ClusterError(f"{named} holds no model; give a checkpoint, a run's folder or a saved model")
    try:
        model_type = json.loads(config.read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise ClusterError(f"{named} has an unreadable config.json; give an undamaged folder") from error
    if not list(folder.glob("*.safetensors")):
        raise ClusterError(f"{named} has no weights (*.safetensors); give an undamaged folder")
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="np"):
                pass
        except SafetensorError as error:
            raise ClusterError(
                f"{named} has damaged weights in {file.name} ({error}); give an undamaged folder"
            ) from error
    if model_type != "mmada":
        raise ClusterError(f"{named} holds a model of type {model_type}; give one that mmada trained")
    return folder


def holds_reward_model(folder: Path) -> bool:
    """Whether a Hugging Face folder, as ``model_folder`` finds it, holds a reward model and not a language model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "MMaDARewardModel" in (config.get("architectures") or [])


def recipe_of(checkpoint: str) -> Path | None:
    """The resolved recipe of the run that a checkpoint belongs to; None for a folder that lies in no run."""
    folder = Path(checkpoint).resolve()
    if folder.name == "model":
        folder = folder.parent
    run_dir = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    recipe = run_dir / RESOLVED_RECIPE
    return recipe if recipe.is_file() else None
