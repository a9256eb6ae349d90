"""``mmada profile``: what each part of a recipe's model costs, and what the whole costs without it.

No training, no Ray: one process builds the model and runs random bytes of the recipe's micro batch through it. Each
part is first run alone, forward and backward, then whole models with one part switched off are run beside the full
one. All contenders take turns, so that a busy machine slows them alike.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.terminal import quiet_terminal
from cluster.tracking import Tracker
from jobs.bench.counting import Kept, count_flops, count_kept
from jobs.bench.measuring import in_turns, torch_threads
from jobs.model_building import build_model, model_config
from jobs.profile_parts import Part, take_apart
from jobs.profile_switches import all_off, config_without, switches_in_use
from jobs.recipe import Recipe, RecipeError
from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM
from mmada.tokenizer import BYTE_OFFSET, IMAGE_CODE_OFFSET

FULL = "full model"
Passes = tuple[float, float]  # milliseconds of a forward and of a backward pass


@dataclass(frozen=True)
class Cost:
    """What one part, or one whole model, takes for a micro batch.

    ``peak_bytes``: most that the CUDA allocator held beyond what was there before; None on a CPU.
    ``flops``: of the forward and of the backward pass. ``num_layers``: calls of the part in one forward pass.
    """

    name: str
    num_layers: int
    passes: list[Passes]
    kept: Kept
    peak_bytes: int | None
    flops: tuple[int, int]
    parameters: int

    @property
    def forward_ms(self) -> list[float]:
        return [forward for forward, _ in self.passes]

    @property
    def backward_ms(self) -> list[float]:
        return [backward for _, backward in self.passes]

    @property
    def step_ms(self) -> list[float]:
        """Both passes, round by round."""
        return [forward + backward for forward, backward in self.passes]

    @property
    def memory(self) -> int:
        """The peak where it can be known, else what is kept for the backward pass and the results."""
        return self.kept.saved + self.kept.output if self.peak_bytes is None else self.peak_bytes


@dataclass(frozen=True)
class Profile:
    """All that ``mmada profile`` shows. ``whole`` and the first of ``models`` are the full model, measured twice."""

    recipe: Recipe
    device: str
    num_threads: int
    rounds: int
    parts: list[Cost]
    whole: Cost
    models: list[Cost]
    refused: list[str]


def run(recipe: Recipe, rounds: int, json_file: Path | None = None) -> int:
    """Profile a recipe, print two tables, record them in MLflow; 0.

    Raises RecipeError for a recipe that cannot be trained here, ClusterError for a tracking server that does not
    answer.
    """
    from jobs.profile_report import publish
    from jobs.recipe_checks import check, check_run_dir

    check(recipe)
    check_run_dir(recipe)
    tracking = recipe.tracking
    tracker = Tracker(tracking.uri, tracking.experiment, recipe.run_dir, f"{recipe.run.name}-profile")
    if tracking.uri is None:
        recipe.run_dir.parent.mkdir(parents=True, exist_ok=True)  # the file that is used without a server lies there
    with (
        tempfile.TemporaryDirectory(prefix="mmada-profile-") as scratch,
        quiet_terminal(Path(scratch) / "log.txt") as terminal,
    ):
        publish(measure(recipe, rounds), tracker, terminal, Path(scratch), json_file)
    return 0


def measure(recipe: Recipe, rounds: int) -> Profile:
    """Every part of the recipe's model alone, then the models without one of them, each set of them in turns."""
    device, config = find_device(recipe), model_config(recipe)
    model = prepared_model(recipe, config, device)
    batch = random_batch(recipe, config, device)
    threads = recipe.cluster.threads_per_worker or max(1, (os.cpu_count() or 1) // recipe.cluster.workers)
    with torch_threads(threads):
        full = contender_of(FULL, model, batch)
        parts = [*map(part_contender, without_repeats(take_apart(model, batch))), full]
        costs = measure_in_turns(parts, rounds)

        models, refused = [full], []
        switches = switches_in_use(config)
        for switch in [*switches, all_off(config)] if len(switches) > 1 else switches:
            try:
                smaller = prepared_model(recipe, config_without(config, switch), device)
            except ValueError as error:
                refused.append(f"without {switch.name}: {error}")
            else:
                models.append(contender_of(f"without {switch.name}", smaller, batch))
        return Profile(
            recipe=recipe,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            num_threads=threads,
            rounds=rounds,
            parts=costs[:-1],
            whole=costs[-1],
            models=measure_in_turns(models, rounds),
            refused=refused,
        )


def find_device(recipe: Recipe) -> torch.device:
    """Where the recipe's workers compute. Raises RecipeError where this machine has no such device."""
    if not recipe.cluster.gpus_per_worker:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RecipeError(
            "cluster.gpus_per_worker=1 wants a GPU, and a profile is taken on this machine, which has none; "
            "use cluster.gpus_per_worker=0, or run it on a node of the cluster"
        )
    return torch.device("cuda")


def prepared_model(recipe: Recipe, config: MMaDAConfig, device: torch.device) -> MMaDAForCausalLM:
    """The model as a worker trains it, in the recipe's precision."""
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    return build_model(recipe, config).to(device, dtype).train()


def random_batch(recipe: Recipe, config: MMaDAConfig, device: torch.device) -> dict[str, Any]:
    """One micro batch of random tokens, one document per row: random bytes where a byte is a token."""
    low, high = (BYTE_OFFSET, IMAGE_CODE_OFFSET) if recipe.data.tokenizer == "bytes" else (0, config.vocab_size)
    shape = (recipe.micro_batch, recipe.train.sequence_length + 1)
    ids = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(recipe.run.seed)).to(device)
    return {
        "input_ids": ids[:, :-1],
        "shift_labels": ids[:, 1:].contiguous(),
        "sample_ids": torch.arange(recipe.micro_batch, device=device),
        "use_cache": False,
    }


@dataclass(frozen=True)
class Contender:
    """Something that can be run forward and backward as often as one likes.

    ``prepare`` makes a forward pass ready and returns it; that returns the tensors to run backward from.
    ``used``: parameters that get a gradient; ``owned``: how many count as its own.
    """

    name: str
    num_layers: int
    prepare: Callable[[], Callable[[], list[Tensor]]]
    used: list[torch.nn.Parameter]
    owned: int


def contender_of(name: str, model: MMaDAForCausalLM, batch: dict[str, Any]) -> Contender:
    """A whole model: embeddings to loss."""
    used = list(model.parameters())
    owned = sum(parameter.numel() for parameter in used)
    return Contender(name, len(model.model.layers), lambda: lambda: [model(**batch).loss], used, owned)


def without_repeats(parts: Iterable[Part]) -> Iterator[tuple[Part, int]]:
    """Each part with the number of its parameters that no part before it has, as a tied head has none."""
    seen: set[int] = set()
    for part in parts:
        parameters = part.parameters()
        yield part, sum(parameter.numel() for key, parameter in parameters.items() if key not in seen)
        seen |= parameters.keys()


def part_contender(part_and_owned: tuple[Part, int]) -> Contender:
    """A part on the inputs that it has in the model."""
    part, owned = part_and_owned

    def prepare() -> Callable[[], list[Tensor]]:
        inputs = part.inputs()
        return lambda: part.forward(inputs)

    return Contender(part.name, len(part.calls), prepare, list(part.parameters().values()), owned)


def measure_in_turns(contenders: list[Contender], rounds: int) -> list[Cost]:
    """Time all of them in turns, and count what can be counted."""
    steps = {each.name: (lambda each=each: passes_of(each)) for each in contenders}
    passes = in_turns(steps, rounds)
    return [counted(each, passes[each.name]) for each in contenders]


def passes_of(contender: Contender) -> Passes:
    """Milliseconds of one forward and one backward pass; no gradients are left from before, nor afterwards."""
    forward = contender.prepare()
    start = finished_at()
    outputs = forward()
    between = finished_at()
    gradients = [torch.randn_like(output) for output in outputs]
    resumed = finished_at()
    torch.autograd.backward(outputs, gradients)
    end = finished_at()
    forget_gradients(contender)
    return 1e3 * (between - start), 1e3 * (end - resumed)


def counted(contender: Contender, passes: list[Passes]) -> Cost:
    """The operations of a contender and the memory that it needs."""
    kept, _ = count_kept(contender.prepare(), contender.used)
    forward_flops, outputs = count_flops(contender.prepare())
    gradients = [torch.randn_like(output) for output in outputs]
    backward_flops, _ = count_flops(lambda: torch.autograd.backward(outputs, gradients))
    forget_gradients(contender)
    peak = None
    if torch.cuda.is_initialized():  # by a model that was put there
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        passes_of(contender)
        peak = torch.cuda.max_memory_allocated() - before
    return Cost(
        name=contender.name,
        num_layers=contender.num_layers,
        passes=passes,
        kept=kept,
        peak_bytes=peak,
        flops=(forward_flops, backward_flops),
        parameters=contender.owned,
    )


def forget_gradients(contender: Contender) -> None:
    for parameter in contender.used:
        parameter.grad = None


def finished_at() -> float:
    """The time in seconds when all work given to the device so far is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
