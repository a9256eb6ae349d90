"""Saving and resuming a training run: the engine's state, the generators, and the model as a folder for anyone.

A checkpoint folder holds ``engine/`` (DeepSpeed's shards), ``model/`` (config, safetensors, tokenizer: what
``AutoModelForCausalLM.from_pretrained`` loads), ``random-<rank>.pt`` and the manifest; after reinforcement learning
also ``others.safetensors`` (the critic), ``reference/`` and ``ledger.jsonl``.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cluster.checkpoints import CheckpointStore, full_disk_named
from cluster.engine import Engine, EngineSettings, check_topology_change, to_universal, topology
from cluster.errors import ClusterError

OTHERS = "others.safetensors"  # what was trained beside the model


@dataclass
class Resume:
    """Where to go on from. ``engine_folder`` is the checkpoint's own, or one converted for this topology."""

    folder: Path | None = None
    engine_folder: Path | None = None
    step: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    same_topology: bool = True
    notes: list[str] = field(default_factory=list)


def find_resume(store: CheckpointStore, settings: EngineSettings, world: int, run_dir: Path) -> Resume | None:
    """The newest checkpoint that passes its checks; damaged ones are passed over, and said so in ``notes``.

    One rank calls this. A checkpoint of another topology is converted to DeepSpeed's universal form, for ``restore``.
    """
    found = Resume()
    found.folder = store.newest_good(lambda damaged: found.notes.append(f"{damaged}; going back to the one before"))
    if found.folder is None:
        return found if found.notes else None
    metadata = found.metadata = store.verify(found.folder)
    found.step, found.engine_folder = metadata["step"], found.folder / "engine"
    wanted = topology(settings, world)
    found.same_topology = metadata["topology"] == wanted
    if not found.same_topology:
        check_topology_change(metadata["topology"], wanted)
        found.engine_folder = run_dir / "universal" / found.folder.name
        shutil.rmtree(run_dir / "universal", ignore_errors=True)
        found.engine_folder.mkdir(parents=True)
        to_universal(found.folder / "engine", found.engine_folder)
        found.notes.append(f"converted {found.folder.name} from {_words(metadata['topology'], wanted)}")
    found.notes.append(f"going on from {found.folder.name}")
    return found


def _words(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    return ", ".join(f"{key} {saved[key]} to {wanted[key]}" for key in wanted if saved[key] != wanted[key])


def save(
    engine: Engine,
    store: CheckpointStore,
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    metadata: dict[str, Any],
    rank: int,
    world: int,
    *,
    prefix: str = "",
    architecture: str = "MMaDAForCausalLM",
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint aside, check it, make it current. All ranks call it, and share out the checksums.

    ``prefix``: how the parameters of the model begin inside what the engine trains; what is trained beside it goes
    into a file of its own. ``beside`` writes further files into the folder, on rank 0.
    """
    shared: list[Any] = [store.begin(step) if rank == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    partial = Path(shared[0])
    try:
        with full_disk_named(store.root):
            engine.save(partial / "engine")
            torch.save(_generators(), partial / f"random-{rank}.pt")
            tensors = {name: tensor for name, tensor in engine.named_full_tensors() if rank == 0}
            if rank == 0:
                own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
                write_model(partial / "model", own, engine.module.config, tokenizer, architecture)
                others = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
                if others:
                    save_file(others, partial / OTHERS)
                if beside is not None:
                    beside(partial)
    except ClusterError:
        if rank == 0:  # the others leave it to the next start: rank 0 may still be writing
            store.abandon(partial)
        raise
    dist.barrier()
    files: list[Any] = [None]
    if rank == 0:
        files[0] = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    dist.broadcast_object_list(files, src=0)
    entries: list[Any] = [None] * world
    dist.all_gather_object(entries, store.file_entries(partial, files[0][rank::world]))
    sealed: list[Any] = [None]
    if rank == 0:
        merged = {name: entry for part in entries for name, entry in part.items()}
        sealed[0] = store.seal(partial, merged, {**metadata, "topology": topology(engine.settings, world)})
    dist.broadcast_object_list(sealed, src=0)
    return Path(sealed[0])


def write_model(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    architecture: str = "MMaDAForCausalLM",
) -> None:
    """A Hugging Face folder: config with the model's class, safetensors, tokenizer, a language model's settings."""
    folder.mkdir(parents=True, exist_ok=True)
    floats = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point() and tensor.dim() > 1}
    config.dtype = floats.pop() if len(floats) == 1 else torch.float32
    config.architectures = [architecture]
    config.save_pretrained(folder)
    if architecture == "MMaDAForCausalLM":
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def restore(engine: Engine, resume: Resume, rank: int, prefix: str = "") -> int:
    """Bring engine and generators to where the checkpoint left them; the number of steps done.

    ``prefix`` as for ``save``.
    """
    assert resume.folder is not None and resume.engine_folder is not None
    if resume.same_topology:
        engine.load(resume.engine_folder)
    else:
        tensors = {f"{prefix}{name}": tensor for name, tensor in _read_model(resume.folder / "model").items()}
        if (others := resume.folder / OTHERS).exists():
            tensors |= load_file(others)
        optimizer_steps = resume.metadata.get("optimizer_steps", resume.step)
        engine.load_universal(resume.engine_folder, optimizer_steps, tensors)
        dist.barrier()
        if rank == 0:  # the converted copy has served: the next checkpoint is one of this topology
            shutil.rmtree(resume.engine_folder.parent)
    own = resume.folder / f"random-{rank}.pt"
    if resume.same_topology and own.exists():
        _set_generators(torch.load(own, weights_only=False))
    else:
        # Generators of other workers mean nothing here; what they feed (dropout) starts from a state of its own.
        torch.manual_seed(resume.step * 1_000_003 + rank)
    return resume.step


def _read_model(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _generators() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
