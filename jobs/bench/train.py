"""``mmada bench train``: what the whole stack costs next to a bare PyTorch loop and transformers' Trainer.

Three contenders train the same model on the same batches with the same number of threads, in turns of a few steps:
Ray Train with DeepSpeed and one worker (in its own process, waiting between its turns), a bare loop, and
``transformers.Trainer``. Beside their tokens per second stands the share of the machine's matmul peak that they reach,
the peak being measured in the same turns. One worker has nothing to split, so ZeRO is off unless ``train.zero_stage``
says otherwise.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.argument_types import file_to_write, int_from
from jobs.bench.measuring import MATMUL_SIZE, matmul_flops, matmul_seconds
from jobs.cli import Parser
from jobs.recipe import Recipe, load_recipe
from jobs.recipe_checks import check

STACK, BARE, TRAINER, PEAK = "mmada (Ray Train, DeepSpeed)", "bare PyTorch loop", "transformers.Trainer", "peak"
_TURN_TIMEOUT_S = 300
_MATMULS = 4  # after each round


def run(arguments: list[str]) -> int:
    """Measure and print; ``arguments`` are the command line's."""
    parser = Parser(prog="mmada bench train", description="the whole stack beside a bare loop and a Trainer")
    parser.add_argument("--rounds", type=int_from(1), default=7, metavar="N", help="turns of each contender (7)")
    parser.add_argument("--steps", type=int_from(1), default=6, metavar="N", help="optimizer steps of a turn (6)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write every single time there, too")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="as for mmada train")
    options = parser.parse_args(arguments)

    from cluster.terminal import quiet_terminal

    with tempfile.TemporaryDirectory(prefix="mmada-bench-") as scratch:
        fixed = [f"run.dir={scratch}", "run.name=bench", "cluster.workers=1", "cluster.expert_parallel=1"]
        recipe = load_recipe("quickstart", ["train.zero_stage=0", *options.overrides, *fixed])
        check(recipe)
        with quiet_terminal(Path(scratch) / "bench.log") as terminal:
            console = Console(file=terminal, highlight=False, width=100)
            measured, flops = _measure(recipe, Path(scratch), options.rounds, options.steps, console)
            _show(console, recipe, measured, flops, options)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


def _measure(
    recipe: Recipe, scratch: Path, rounds: int, steps: int, console: Console
) -> tuple[dict[str, list[float]], float]:
    """Seconds per step of every contender's turns (and per product under ``peak``); the model's flops per token."""
    import os

    import torch

    from jobs.model_building import model_config
    from jobs.prepared_data import text_source
    from mmada.data import load_tokenizer, prepare
    from mmada.model import count_parameters

    threads = recipe.cluster.threads_per_worker or os.cpu_count() or 1
    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    prepared = prepare(text_source(recipe), tokenizer, scratch / "data", held_out=recipe.data.held_out).folder
    config = model_config(recipe)
    width = config.num_attention_heads * (config.head_dim or 0)
    attention = config.num_hidden_layers * recipe.train.sequence_length * width
    flops_per_token = 6 * count_parameters(config)[1] + 12 * attention  # PaLM, arXiv:2204.02311, appendix B

    console.print(f"{threads} threads, {rounds} turns of {steps} steps each; starting Ray …")
    measured: dict[str, list[float]] = {STACK: [], BARE: [], TRAINER: [], PEAK: []}
    with _stack_turns(recipe, scratch, prepared, threads) as stack_turn:
        contenders: dict[str, Callable[[int], float]] = {
            STACK: stack_turn,
            BARE: _bare_turn(recipe, prepared),
            TRAINER: _trainer_turn(recipe, prepared, scratch),
        }
        for number in range(rounds + 1):  # the first round warms up and is not kept
            order = list(contenders)
            for name in order[number % 3 :] + order[: number % 3]:
                seconds = contenders[name](steps)
                if number:
                    measured[name].append(seconds)
            measured[PEAK] += [matmul_seconds() for _ in range(_MATMULS)]
    return measured, float(flops_per_token)


@contextmanager
def _stack_turns(recipe: Recipe, scratch: Path, prepared: Path, threads: int) -> Iterator[Callable[[int], float]]:
    """The whole stack in a Ray Train worker; yields what makes it run some steps and says seconds per step."""
    from threading import Thread

    from ray.util.queue import Queue

    from cluster.launch import run_workers
    from cluster.session import RaySession

    (scratch / "bench" / "logs").mkdir(parents=True)
    with RaySession(None, workers=1, cpus_per_worker=1, gpus_per_worker=0, log_dir=scratch, timeout_s=120):
        go, done = Queue(actor_options={"num_cpus": 0}), Queue(actor_options={"num_cpus": 0})
        config = {
            "recipe": recipe.model_dump(),
            "run_dir": str(scratch / "bench"),
            "prepared": str(prepared),
            "threads": threads,
            "go": go,
            "done": done,
        }
        trainer = Thread(
            target=run_workers,
            args=(_stack_worker, config),
            kwargs={
                "workers": 1,
                "resources_per_worker": {"CPU": 1},
                "backend": "gloo",
                "attempt_dir": scratch / "ray" / "bench",
                "max_failures": 0,
                "on_message": lambda message: None,
            },
            daemon=True,
        )
        trainer.start()

        def turn(steps: int) -> float:
            go.put(steps)
            return done.get(timeout=_TURN_TIMEOUT_S)

        try:
            yield turn
        finally:
            go.put(0)
            trainer.join(timeout=60)


def _stack_worker(config: dict[str, Any]) -> None:
    """In the Ray Train worker: steps on request, reports included, as ``mmada train`` does them."""
    import ray.train
    import torch

    from jobs.worker import TrainingWorker

    recipe = Recipe.model_validate(config["recipe"])
    worker = TrainingWorker(
        recipe, Path(config["run_dir"]), Path(config["prepared"]), torch.device("cpu"), ray.train.report
    )
    torch.set_num_threads(config["threads"])
    step = 0
    while steps := config["go"].get(timeout=_TURN_TIMEOUT_S):
        started = time.perf_counter()
        for _ in range(steps):
            worker.progress.add(step + 1, worker.train_step(step))
            worker.progress.send()
            step += 1
        config["done"].put((time.perf_counter() - started) / steps)


def _bare_turn(recipe: Recipe, prepared: Path) -> Callable[[int], float]:
    from jobs.bare_loop import BareLoop, text_batches

    loop, done = BareLoop(recipe, text_batches(recipe, prepared)), 0

    def turn(steps: int) -> float:
        nonlocal done
        started = time.perf_counter()
        for _ in range(steps):
            loop.step(done)
            done += 1
        return (time.perf_counter() - started) / steps

    return turn


def _trainer_turn(recipe: Recipe, prepared: Path, scratch: Path) -> Callable[[int], float]:
    """transformers' Trainer on the same rows; a turn's first step (which sets it up) is not timed."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from jobs.model_building import build_model
    from mmada.data import global_batch_indices, open_prepared, sample_ids

    train = recipe.train
    rows, model, done = open_prepared(prepared).train.rows(train.sequence_length), build_model(recipe), 0

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    def turn(steps: int) -> float:
        nonlocal done
        batches = []
        for step in range(done, done + steps + 1):
            batch = rows.batch(global_batch_indices(recipe.run.seed, step, train.global_batch, len(rows)))
            batch["sample_ids"] = torch.from_numpy(sample_ids(recipe.run.seed, step, train.global_batch))
            batches += [{name: value[row] for name, value in batch.items()} for row in range(train.global_batch)]
        done += steps
        clock = Clock()
        arguments = TrainingArguments(
            output_dir=str(scratch / "trainer"),
            per_device_train_batch_size=train.global_batch,
            max_steps=steps + 1,
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            max_grad_norm=train.clip_grad_norm,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            label_names=["shift_labels"],
        )
        Trainer(model=model, args=arguments, train_dataset=batches, callbacks=[clock]).train()
        return (clock.ends[-1] - clock.ends[0]) / steps

    return turn


def _show(console: Console, recipe: Recipe, measured: dict[str, list[float]], flops: float, options: Any) -> None:
    tokens = recipe.train.global_batch * recipe.train.sequence_length
    peak = matmul_flops(min(measured[PEAK]))
    what = f"preset {recipe.model.preset}, ZeRO {recipe.train.zero_stage}, {flops / 1e6:.1f} MFLOP per token"
    table = Table(title=f"{tokens} tokens per step, {what}")
    for column in ("", "tokens/s", "min – max", "of the bare loop", "of the peak"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name in (STACK, BARE, TRAINER):
        speeds = [tokens / seconds for seconds in measured[name]]
        # Ratios turn by turn: what slows the machine for a while slows neighbouring turns alike.
        ratio = statistics.median(b / s for s, b in zip(measured[name], measured[BARE], strict=True))
        median = statistics.median(speeds)
        share = median * flops / peak
        table.add_row(
            name, f"{median:,.0f}", f"{min(speeds):,.0f} – {max(speeds):,.0f}", f"{ratio:.2f}", f"{share:.0%}"
        )
    console.print(table)
    console.print(
        f"medians of {options.rounds} turns in rotation; "
        f"peak {peak / 1e12:.3f} TFLOP/s: the best float32 product of {MATMUL_SIZE} squared"
    )
