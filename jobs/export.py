"""``mmada export``: a checkpoint's model as a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from cluster.errors import ClusterError
from jobs.checkpoint_folder import holds_reward_model, model_folder


def run(checkpoint: str, directory: str) -> int:
    """Copy the Hugging Face folder of ``checkpoint`` to ``directory``, which must not hold anything yet."""
    source, target = model_folder(checkpoint), Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ClusterError(f"directory={directory} is not empty; give a new one")
    aside = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(source, aside)
        if target.exists():
            target.rmdir()
        aside.rename(target)
    except OSError as error:
        raise ClusterError(f"directory={directory} cannot be written ({error.strerror}); give another one") from error
    kind, module = ("CausalLM", "model")
    if holds_reward_model(target):
        kind, module = ("SequenceClassification", "reward_model")
    print(f"{target}  load it with AutoModelFor{kind}.from_pretrained after `import mmada.{module}`")
    return 0
