"""``mmada profile``: what each part of a recipe's model costs, and what the whole costs without it.

No training, no Ray: one process builds the model and runs random bytes of the recipe's micro batch through it. Each
part is first run alone, forward and backward, then whole models with one part switched off are run beside the full
one. All contenders take turns, so that a busy machine slows them alike.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from cluster.terminal import quiet_terminal
from cluster.tracking import BUFFER, Tracker
from jobs.bench.counting import Kept, count_flops, count_kept
from jobs.bench.measuring import in_turns, torch_threads
from jobs.model_building import build_model, model_config
from jobs.profiling.parts import Part, take_apart
from jobs.profiling.switches import all_off, config_without, switches_in_use
from jobs.recipe import Recipe, RecipeError
from jobs.recipe_schema import AUTO
from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM
from mmada.nn.patches.boundaries import entropies, threshold_for_size
from mmada.tokenizer import BYTE_OFFSET, IMAGE_CODE_OFFSET

FULL = "nothing (the full model)"
Passes = tuple[float, float]  # milliseconds of a forward and of a backward pass


@dataclass(frozen=True)
class Cost:
    """What one part, or one whole model, takes for a micro batch.

    ``peak_bytes``: most that the CUDA allocator held beyond what was there before; None on a CPU.
    ``flops``: of the forward and of the backward pass. ``num_layers``: calls of the part in one forward pass.
    ``beside``: the full model's passes right before or after these, for a model without one part.
    """

    name: str
    num_layers: int
    passes: list[Passes]
    kept: Kept
    peak_bytes: int | None
    flops: tuple[int, int]
    parameters: int
    beside: list[Passes] = field(default_factory=list)

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
    """All that ``mmada profile`` shows.

    ``tokens``: what went through. ``whole``: the full model among its parts. ``models``: the full model again, then
    those without one part, by that part's name. ``refused``: those that cannot be built.
    """

    recipe: Recipe
    device: str
    num_threads: int
    rounds: int
    tokens: str
    parts: list[Cost]
    whole: Cost
    models: list[Cost]
    refused: list[str]


def run(recipe: Recipe, rounds: int, json_file: Path | None = None) -> int:
    """Profile a recipe, print two tables, record them in MLflow; 0.

    Raises RecipeError for a recipe that cannot be trained here, ClusterError for a tracking server that does not
    answer.
    """
    from jobs.profiling.report import publish
    from jobs.recipe_checks import check, check_run_dir

    check(recipe)
    if recipe.train.micro_batch == AUTO:
        raise RecipeError(
            "train.micro_batch=auto is found by `mmada train`, and a profile takes one micro batch; give its rows, "
            "such as train.micro_batch=1"
        )
    check_run_dir(recipe)
    tracking = recipe.tracking
    name = f"{recipe.run.name}-profile"
    buffer = recipe.run_dir.with_name(name) / BUFFER  # run.dir stays free for the run itself
    tracker = Tracker(tracking.uri, tracking.experiment, recipe.run_dir, name, buffer=buffer)
    if tracking.uri is None:
        recipe.run_dir.parent.mkdir(parents=True, exist_ok=True)  # the file that is used without a server lies there
    with (
        tempfile.TemporaryDirectory(prefix="mmada-profile-") as scratch,
        quiet_terminal(Path(scratch) / "log.txt") as terminal,
    ):
        profile = measure(recipe, rounds, lambda text: print(text, file=terminal, flush=True))
        publish(profile, tracker, terminal, Path(scratch), json_file)
    return 0


def measure(recipe: Recipe, rounds: int, say: Callable[[str], None] = lambda text: None) -> Profile:
    """Every part of the recipe's model alone, then the models without one of them, each set of them in turns.

    ``say`` hears what is measured next.
    """
    device, config = find_device(recipe), model_config(recipe)
    model = prepared_model(recipe, config, device)
    batch, tokens = profile_batch(recipe, config, device)
    settle_threshold(model, batch["input_ids"])
    config = model.config
    threads = recipe.cluster.threads_per_worker or max(1, (os.cpu_count() or 1) // recipe.cluster.workers)
    with torch_threads(threads):
        full = contender_of(FULL, model, batch)
        parts = [*map(part_contender, without_repeats(take_apart(model, batch))), full]
        say(f"timing {len(parts) - 1} parts of {recipe.run.name}, {rounds} rounds …")
        costs = measure_in_turns(parts, rounds)

        models, refused = [], []
        switches = switches_in_use(config)
        for switch in [*switches, all_off(config)] if len(switches) > 1 else switches:
            try:
                smaller = prepared_model(recipe, config_without(config, switch), device)
            except ValueError as error:
                refused.append(f"without {switch.name}: {error}")
            else:
                models.append(contender_of(switch.name, smaller, batch))
        say(f"timing {len(models)} models without one of its parts, {rounds} rounds …")
        return Profile(
            recipe=recipe,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            num_threads=threads,
            rounds=rounds,
            tokens=tokens,
            parts=costs[:-1],
            whole=costs[-1],
            models=measure_in_pairs(full, models, rounds),
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


def profile_batch(recipe: Recipe, config: MMaDAConfig, device: torch.device) -> tuple[dict[str, Any], str]:
    """One micro batch, one document per row, and what it is of: text where that decides how long patches are."""
    rows, length = recipe.micro_batch, recipe.train.sequence_length + 1
    if config.patches.mode not in ("none", "static"):
        text = "\n".join(topics.values()).encode()
        text *= 1 + rows * length // len(text)
        ids = torch.tensor([*text[: rows * length]]).view(rows, length) + BYTE_OFFSET
        what = "bytes of Python's help texts"
    else:
        is_bytes = recipe.data.tokenizer == "bytes"
        low, high = (BYTE_OFFSET, IMAGE_CODE_OFFSET) if is_bytes else (0, config.vocab_size)
        ids = torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(recipe.run.seed))
        what = "random bytes" if is_bytes else "random tokens"
    ids = ids.to(device)
    batch = {
        "input_ids": ids[:, :-1],
        "shift_labels": ids[:, 1:].contiguous(),
        "sample_ids": torch.arange(rows, device=device),
        "use_cache": False,
    }
    return batch, what


def settle_threshold(model: MMaDAForCausalLM, input_ids: Tensor) -> None:
    """Give a model whose recipe leaves the patches' threshold open the one that cuts these rows as asked."""
    patches = model.config.patches
    if not patches.needs_entropy_model or patches.threshold is not None:
        return
    assert model.model.patches is not None and model.model.patches.entropy_model is not None
    with torch.no_grad():
        entropy_BT = entropies(model.model.patches.entropy_model(input_ids, use_cache=False).logits)
    index_BT = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    try:
        patches.threshold = threshold_for_size(patches, index_BT, entropy_BT)
    except ValueError as error:
        raise RecipeError(f"model.{error}") from error


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


def measure_in_pairs(full: Contender, models: list[Contender], rounds: int) -> list[Cost]:
    """The full model, then the others, each timed next to the full one; which of the two goes first takes turns."""

    def pair(model: Contender) -> Callable[[], tuple[Passes, Passes]]:
        full_first = itertools.cycle([True, False])

        def step() -> tuple[Passes, Passes]:
            if next(full_first):
                before = passes_of(full)
                return passes_of(model), before
            return passes_of(model), passes_of(full)

        return step

    if not models:
        return measure_in_turns([full], rounds)
    pairs = in_turns({model.name: pair(model) for model in models}, rounds)
    costs = [counted(full, [beside for taken in pairs.values() for _, beside in taken])]
    for model in models:
        own, other = zip(*pairs[model.name], strict=True)
        costs.append(replace(counted(model, list(own)), beside=list(other)))
    return costs


def passes_of(contender: Contender) -> Passes:
    """Milliseconds of one forward and one backward pass; no gradients are left from before, nor afterwards."""
    forward = contender.prepare()
    start = finished_at()
    outputs = forward()
    between = finished_at()
    gradients = [torch.randn_like(output) for output in outputs]
    resumed = finished_at()
    backward(outputs, gradients)
    end = finished_at()
    forget_gradients(contender)
    return 1e3 * (between - start), 1e3 * (end - resumed)


def backward(outputs: list[Tensor], gradients: list[Tensor]) -> None:
    """From all outputs at once; nothing for a part that is not trained, as the model that patches are cut by."""
    if outputs:
        torch.autograd.backward(outputs, gradients)


def counted(contender: Contender, passes: list[Passes]) -> Cost:
    """The operations of a contender and the memory that it needs."""
    kept, _ = count_kept(contender.prepare(), contender.used)
    forward_flops, outputs = count_flops(contender.prepare())
    gradients = [torch.randn_like(output) for output in outputs]
    backward_flops, _ = count_flops(lambda: backward(outputs, gradients))
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
