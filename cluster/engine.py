"""The training engine: DeepSpeed behind a small surface. The only module that imports deepspeed.

One worker builds one ``Engine``. What it must know of the model (where the experts are) comes in as plain values,
so that nothing here depends on a model family.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.device_memory import tensors_in
from cluster.errors import ClusterError
from cluster.expert_names import DOWN, GATE, UP, ExpertNames
from cluster.gradient_products import gradient_products, hooks_of, unnoticed
from cluster.lean_imports import load_uncompiled, without_modules
from cluster.parameter_groups import FACTOR, FROZEN, SPLITS, WaitingAdamW, matches, parameter_groups

# DeepSpeed's autotuner, which nobody here calls, loads the whole of MLflow where it finds it.
with without_modules("mlflow"):
    import deepspeed
    from deepspeed.moe.ep_experts import GroupedExperts
    from deepspeed.moe.utils import configure_moe_param_groups
    from deepspeed.utils import groups, safe_set_full_fp32_param, safe_set_full_optimizer_state, set_z3_leaf_module

# Elements that DeepSpeed gathers before it reduces gradients; its own default of 5e8 takes 2 GB in float32.
REDUCE_BUCKET_SIZE = 50_000_000
_TAG = "engine"
_NO_EXPERTS = {"router_pattern": "gate", "expert_pattern": "experts", "expert_w1": "w1", "expert_w2": "w2"}


@dataclass(frozen=True)
class EngineSettings:
    """What DeepSpeed is told. Sizes count rows; ``expert_layout`` is the model's ``expert_parallel_layout()``."""

    zero_stage: int
    precision: str  # "fp32" or "bf16"
    micro_batch: int
    accumulation: int
    clip_grad_norm: float
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    # Pairs of a regular expression and what the learning rate of parameters whose names hold it is multiplied with.
    learning_rate_factors: tuple[tuple[str, float], ...] = ()
    # Regular expressions of parameter names that ``freeze`` may be asked for.
    freezable: tuple[str, ...] = ()
    offload_optimizer: bool = False
    expert_parallel: int = 1
    expert_layout: dict[str, Any] | None = None
    # ZeRO 3: classes of modules whose parameters are gathered together, children's included. Others' are gathered at
    # every call of the module that has them, and all workers must make the same calls.
    gathered_whole: tuple[str, ...] = ()
    # (tokens sorted by expert, counts, gate, up, down) -> outputs: takes the place of DeepSpeed's loop over the
    # experts on CPUs; on GPUs DeepSpeed has grouped kernels.
    expert_ffn: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None

    def deepspeed_config(self) -> dict[str, Any]:
        """The configuration handed to ``deepspeed.initialize``."""
        zero: dict[str, Any] = {"stage": self.zero_stage, "reduce_bucket_size": REDUCE_BUCKET_SIZE}
        if self.zero_stage == 3:
            zero["stage3_param_persistence_threshold"] = 0  # small models would otherwise not be partitioned at all
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if self.offload_optimizer:
            config["zero_force_ds_cpu_optimizer"] = False
        if self.precision == "bf16":
            config["bf16"] = {"enabled": True}
        if self.expert_parallel > 1:
            config["expert_parallel"] = {
                "enabled": True,
                "autoep_size": self.expert_parallel,
                "use_grouped_mm": torch.cuda.is_available(),
                **(self.expert_layout or {}),
            }
        return config


class Engine:
    """A model wrapped for ZeRO and expert parallelism; every method is called by all workers together."""

    def __init__(self, model: nn.Module, settings: EngineSettings) -> None:
        """Wrap ``model``; torch.distributed must be initialised. The expert blocks are swapped in place."""
        self.settings, self.module = settings, model
        self._names = ExpertNames(settings.expert_layout or _NO_EXPERTS)
        self._gradient_norm = 0.0
        self._hooks: list[Any] = []
        # Without ZeRO in fp32 DeepSpeed steps the optimizer itself: no partitions, and no norm kept.
        self._is_plain = settings.zero_stage == 0 and settings.precision == "fp32"
        # An all-reduce for inference, which DeepSpeed would compile whenever a CPU is trained on (a minute and a
        # gigabyte for every worker) and training never calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed asks of every optimizer whether it is its own Muon, and would load a compiler to ask.
        load_uncompiled("deepspeed.runtime.zero.muon.muon_optimizer", deepspeed.runtime.compiler)
        deepspeed.init_distributed(dist_init_required=False)
        for module in model.modules():
            if type(module).__name__ in settings.gathered_whole:
                set_z3_leaf_module(module, True)
        config = settings.deepspeed_config()
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        groups = parameter_groups(model, settings.weight_decay, settings.learning_rate_factors, settings.freezable)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, model_parameters=groups, optimizer=self._make_optimizer, config=config
        )
        if settings.expert_parallel > 1 and settings.expert_ffn is not None and not torch.cuda.is_available():
            for module in model.modules():
                if isinstance(module, GroupedExperts):
                    module.forward = partial(_experts_on_cpu, module, settings.expert_ffn)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # steps of 1e-3 would be lost in 16 bits
                buffer.data = buffer.data.float()

    def _make_optimizer(self, groups: list[dict[str, Any]]) -> WaitingAdamW:
        """PyTorch's own AdamW, but for what it passes over: no compiler is needed when a run starts."""
        own = self.settings
        if own.expert_parallel > 1:  # experts that workers share out are reduced apart
            groups = configure_moe_param_groups(groups)
        return WaitingAdamW(groups, lr=own.learning_rate, betas=own.betas, eps=own.epsilon)

    def forward(self, **batch: Any) -> Any:
        """The model's own output for this worker's rows."""
        output = self._engine(**batch)
        self._hooks = hooks_of(output)
        return output

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro batch; the loss is divided by the number of micro batches here."""
        self._engine.backward(loss)

    def gradient_products(self, losses: Sequence[Tensor]) -> Tensor:
        """The products of the losses' gradients over all parameters that learn, (K, K) float64, alike on all workers.

        The losses are of the last ``forward``, and may go backward afterwards. A gradient is that of the mean over
        workers, as a step would take it. Raises ClusterError at ZeRO stage 3, where a worker has no parameter whole.
        """
        if self.settings.zero_stage == 3:
            raise ClusterError("train.zero_stage=3 keeps no gradient whole; use train.zero_stage=0, 1 or 2")
        with unnoticed(self._hooks):
            return gradient_products(
                self.module, losses, groups._get_expert_data_parallel_group, groups._get_expert_parallel_group
            )

    def step(self, learning_rate: float) -> None:
        """After each ``backward``: at the last micro batch, clip, step and clear; at the others, nothing."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get(FACTOR, 1.0)
        if self._is_plain and self._engine.is_gradient_accumulation_boundary():
            norms = [p.grad.norm() for p in self.module.parameters() if p.grad is not None]
            self._gradient_norm = float(torch.stack(norms).norm())
        self._engine.step()
        if not self._is_plain:
            self._gradient_norm = float(self._engine.get_global_grad_norm() or 0.0)

    def set_batch(self, micro_batch: int, accumulation: int) -> None:
        """From the next step on: rows of one backward pass of this worker, and how many of them make a step."""
        self._engine.set_train_micro_batch_size(micro_batch)
        self._engine.set_train_batch_size(micro_batch * accumulation * dist.get_world_size())
        if hasattr(self._optimizer, "gradient_accumulation_steps"):
            self._optimizer.gradient_accumulation_steps = accumulation
        self.settings = replace(self.settings, micro_batch=micro_batch, accumulation=accumulation)

    def freeze(self, patterns: Sequence[str]) -> None:
        """From the next step on parameters whose names hold one of these do not learn, and all others do.

        ``patterns`` are some of ``settings.freezable``. What is frozen has no gradient, does not decay and keeps the
        optimizer's state.
        """
        numbers = {self.settings.freezable.index(pattern) for pattern in patterns}
        for group in self._optimizer.param_groups:
            group[FROZEN] = not numbers.isdisjoint(group[SPLITS])
        for name, parameter in self.module.named_parameters():
            if name in self._trained:
                parameter.requires_grad_(not any(matches(pattern, name) for pattern in patterns))

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last step's gradients, before clipping."""
        return self._gradient_norm

    def set_training(self, training: bool) -> None:
        """Training mode with gradients to come, or evaluation."""
        self._engine.train(training)

    def destroy(self) -> None:
        """Give back the memory of engine and model, neither of which can be used afterwards."""
        self._engine.destroy()
        if self.settings.zero_stage < 3:
            return  # nobody else holds them now
        # At stage 3 hooks inside autograd keep parameters and optimizer alive for good: what they hold is emptied.
        base = self._optimizer.optimizer
        kept = [getattr(parameter, "ds_tensor", None) for parameter in self.module.parameters()]
        for tensor in tensors_in([[*self.module.parameters()], kept, vars(self._optimizer), vars(base)]):
            tensor.grad, tensor.data = None, tensor.data.new_empty(0)

    def save(self, folder: Path) -> None:
        """Write this worker's part of the engine's state below ``folder``."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=True)

    def load(self, folder: Path) -> None:
        """Read the state that ``save`` wrote at this topology. Raises ClusterError when nothing can be read."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise ClusterError(f"checkpoint={folder} holds no engine state; use a folder that a run wrote")

    def load_universal(self, folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
        """Read what ``to_universal`` wrote, at any ZeRO stage, number of workers and expert-parallel size.

        Weights, both moments and the step count of every parameter are set one by one. DeepSpeed's own loader
        is not used: under ZeRO 3 it brings back weights but not all moments, which shows at the second step.
        ``tensors`` are those of the saved model by their own names, of which the persistent buffers and the frozen
        parameters are taken; ``step`` the optimizer steps done.
        """
        saved = {self._names.canonical(path.name): path for path in (folder / _TAG / "zero").iterdir() if path.is_dir()}
        self._prepare_moments(step)
        for name, parameter in self.module.named_parameters():
            canonical, part = self._names.canonical(name)
            if not parameter.requires_grad:
                self._copy(parameter, tensors[canonical])
                continue
            for key in ("fp32", "exp_avg", "exp_avg_sq"):
                whole = _read_universal(saved, canonical, part, key)
                value = self._names.part(whole, part, *self._expert_position(parameter))
                self._set(parameter, key, value.to(parameter.device))
        for name, buffer in self.module.named_buffers():
            canonical = self._names.canonical(name)[0]
            if canonical in tensors:
                buffer.copy_(tensors[canonical])

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set one of a parameter's three tensors: ``fp32`` (the weight), ``exp_avg`` or ``exp_avg_sq``."""
        value = value.view(getattr(parameter, "ds_shape", parameter.shape))
        if key != "fp32":
            if self._is_plain:
                self._optimizer.state[parameter][key] = value.clone()
            else:
                safe_set_full_optimizer_state(parameter, value, key)
            return
        if not self._is_plain:
            safe_set_full_fp32_param(parameter, value)
        self._copy(parameter, value)

    @staticmethod
    def _copy(parameter: nn.Parameter, value: Tensor) -> None:
        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")),
        ):
            parameter.data.copy_(value)

    def _prepare_moments(self, step: int) -> None:
        """Give every tensor that the optimizer steps empty moments and its step count."""
        base = getattr(self._optimizer, "optimizer", self._optimizer)
        if self.settings.zero_stage == 3:  # the groups of the base optimizer are empty between steps
            stepped = self._optimizer.fp32_partitioned_groups_flat
        else:
            stepped = [tensor for group in base.param_groups for tensor in group["params"]]
        for tensor in stepped:
            base.state[tensor] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
        link = getattr(self._optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # ZeRO 1 and 2: let each parameter know its share of the moments
            link()

    def named_full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and persistent buffer, whole, under the model's own names, one at a time.

        Shards of ZeRO 3 and experts of other workers are gathered; the expert layer that expert parallelism put in
        the model's place is mapped back. All workers must walk through it; the tensors are on the CPU.
        """
        waiting: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                tensor = parameter.detach().clone()
            canonical, part = self._names.canonical(name)
            if part is not None:
                tensor = self._gather_experts(parameter, tensor)
            if part in (GATE, UP):
                waiting[part] = tensor
                if len(waiting) < 2:
                    continue
                tensor = self._names.fuse(waiting.pop(GATE), waiting.pop(UP))
            yield canonical, tensor.cpu()
        for module_name, module in self.module.named_modules():
            for name, buffer in module.named_buffers(module_name, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    yield self._names.canonical(name)[0], buffer.detach().cpu().clone()

    def _expert_position(self, parameter: nn.Parameter) -> tuple[int, int]:
        """(rank, size) of this worker among those that share a parameter's experts; (0, 1) for other parameters."""
        if not hasattr(parameter, "group_name"):
            return 0, 1
        group = groups._get_expert_parallel_group(parameter.group_name)
        return dist.get_rank(group), dist.get_world_size(group)

    def _gather_experts(self, parameter: nn.Parameter, local_EFD: Tensor) -> Tensor:
        group = groups._get_expert_parallel_group(getattr(parameter, "group_name"))  # noqa: B009 (set by DeepSpeed)
        parts = [torch.empty_like(local_EFD) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local_EFD.contiguous(), group=group)
        return torch.cat(parts, dim=0)


def _experts_on_cpu(experts: GroupedExperts, ffn: Callable[..., Tensor], x: Tensor, counts: Tensor) -> Tensor:
    return ffn(x, counts, experts.w1, experts.w3, experts.w2)


def _read_universal(saved: dict[tuple[str, str | None], Path], canonical: str, part: str | None, key: str) -> Tensor:
    """A whole tensor by the model's own name, from files in either naming."""

    def read(path: Path) -> Tensor:
        content = torch.load(path / f"{key}.pt", weights_only=False)
        return content["param"] if isinstance(content, dict) else content

    for own in ((canonical, None), (canonical, DOWN)):
        if own in saved:
            return read(saved[own])
    try:
        return ExpertNames.fuse(read(saved[canonical, GATE]), read(saved[canonical, UP]))
    except KeyError as error:
        raise ClusterError(f"checkpoint lacks parameter {canonical}; use one of a run with the same model") from error


def to_universal(source: Path, target: Path) -> None:
    """Convert the state below ``source`` so that another number of workers can load it from ``target``.

    One worker calls this. DeepSpeed's universal checkpoint keeps one file per parameter and optimizer moment.
    """
    from deepspeed.checkpoint import ds_to_universal

    # DeepSpeed puts the folders' names into patterns as they are, and a "+" or "(" in one breaks them: so it is shown
    # plain names, relative to the target.
    (target / "source").symlink_to((source / _TAG).absolute())
    with contextlib.chdir(target):
        ds_to_universal.main(
            Namespace(
                input_folder="source",
                output_folder=_TAG,
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )


def topology(settings: EngineSettings, world_size: int) -> dict[str, Any]:
    """What a saved engine state depends on: equal topologies load each other's state as it is.

    Without ZeRO every worker holds the same state, so their number does not matter.
    """
    return {
        "workers": world_size if settings.zero_stage else "any",
        "zero_stage": settings.zero_stage,
        "expert_parallel": settings.expert_parallel,
        "precision": settings.precision,
        "offload_optimizer": settings.offload_optimizer,
    }


def check_topology_change(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ClusterError, naming field, value and remedy, where a saved state cannot become the wanted one."""
    if saved == wanted:
        return
    if saved["zero_stage"] == 0:
        raise ClusterError(
            f"train.zero_stage={wanted['zero_stage']} cannot take up a checkpoint of ZeRO stage 0 at another "
            "topology; go on with train.zero_stage=0 and the same precision"
        )
    for key in ("precision", "offload_optimizer"):
        if saved[key] != wanted[key]:
            raise ClusterError(
                f"train.{key}={wanted[key]} differs from the checkpoint's {saved[key]}; go on with "
                f"train.{key}={saved[key]}"
            )
