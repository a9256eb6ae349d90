"""``mmada register``: a checkpoint's model in MLflow's registry, for anyone with ``mlflow.pyfunc.load_model``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.checkpoints import MANIFEST
from cluster.errors import ClusterError
from cluster.tracking_buffer import BUFFER, STATE, read_json
from cluster.tracking_registry import Registration, register
from cluster.tracking_uri import shown
from jobs.checkpoint_folder import holds_reward_model, model_folder, recipe_of
from jobs.quiet_transformers import quiet_transformers

# What the package mmada needs where a model is loaded.
REQUIREMENTS = (
    "mlflow",
    "huggingface_hub",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "scipy",
    "torch",
    "transformers",
)


def run(checkpoint: str, name: str, uri: str | None) -> int:
    """Register the model of ``checkpoint`` as the next version of ``name`` and say how to load it.

    ``uri``: where; None for where the checkpoint's run was recorded. Raises ClusterError where there is no model, no
    such place, or the place refuses.
    """
    if not name or set(name) & set("/:"):
        raise ClusterError(f"NAME={name!r} is no name of a registered model; use one without / and :")
    folder = model_folder(checkpoint)
    recipe = recipe_of(str(folder))
    state = read_json(recipe.parent / BUFFER / STATE) if recipe else {}
    place = uri or state.get("uri")
    if place is None:
        raise ClusterError(
            f"checkpoint={checkpoint} belongs to no run that is recorded in MLflow; say where it goes: --uri "
            "http://host:port or sqlite:///file.db"
        )
    with quiet_transformers():
        model = registration(folder)
    run_id = state.get("run_id") if place == state.get("uri") else None
    number = register(place, name, model, state.get("experiment", "mmada"), run_id)
    print(f"registered {name} version {number} in {shown(place)}")
    columns = ", ".join(model.inputs), ", ".join(model.outputs)
    print(f"load it with MLFLOW_TRACKING_URI={shown(place)} and, in Python,")
    print(f'  mlflow.pyfunc.load_model("models:/{name}/{number}").predict(table)   # {columns[0]} -> {columns[1]}')
    return 0


def registration(folder: Path) -> Registration:
    """What goes into the registry of a Hugging Face folder: code, signature, an example, where the checkpoint lies."""
    import mmada
    from mmada import served

    is_reward = holds_reward_model(folder)
    tags = reference(folder)
    return Registration(
        folder=folder,
        loader_module="mmada.served",
        code=Path(mmada.__file__).parent,
        inputs=served.REWARD_INPUTS if is_reward else served.TEXT_INPUTS,
        outputs=served.REWARD_OUTPUTS if is_reward else served.TEXT_OUTPUTS,
        params={} if is_reward else served.TEXT_PARAMS,
        example={"prompt": ["The "], "completion": ["end"]} if is_reward else {"prompt": ["The "]},
        requirements=REQUIREMENTS,
        tags=tags,
        step=tags.get("checkpoint.step", 0),
    )


def reference(folder: Path) -> dict[str, Any]:
    """Where the checkpoint of a Hugging Face folder lies, its size and checksum; {} for a folder in none."""
    file = folder.parent / MANIFEST
    if folder.name != "model" or not file.is_file():
        return {}
    manifest = json.loads(file.read_text(encoding="utf-8"))
    return {
        "checkpoint.path": str(folder.parent.resolve()),
        "checkpoint.step": manifest["step"],
        "checkpoint.bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "checkpoint.sha256": manifest["manifest_sha256"],
    }
