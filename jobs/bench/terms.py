"""``mmada bench terms``: what a step costs with each loss beside the language model's, and with its weight at zero.

One model with routed gates learns under every setting, in this process and through the same worker and engine as in a
run; the settings take turns. A weight of zero should cost nothing that can be measured.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.argument_types import int_from
from jobs.bench.measuring import Timings, bench_parser, in_turns, run_bench, time_of, with_spread

if TYPE_CHECKING:
    from rich.table import Table

    from jobs.recipe import Recipe

FLOOR = "no terms"
_QUICK = ["model.hidden_size=16", "train.global_batch=2", "train.sequence_length=16", "data.limit_documents=20"]


def run(arguments: list[str]) -> int:
    """Measure and print one table; 0. Raises CommandError for arguments, RecipeError for keys of the recipe."""
    parser = bench_parser("terms", "a step with each loss beside the language model's, and with its weight at 0", 15)
    parser.add_argument("--steps", type=int_from(1), default=2, metavar="N", help="optimizer steps of a turn (2)")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="as for mmada train hybrid")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.steps, options.overrides = 2, 1, [*_QUICK, *options.overrides]

    def measure(threads: int) -> tuple[list[Any], Any]:
        with tempfile.TemporaryDirectory(prefix="mmada-bench-") as scratch:
            recipes = recipes_for(Path(scratch), options.overrides)
            times = step_times(recipes, Path(scratch), options.rounds, options.steps)
        note = (
            f"{threads} threads, {options.rounds} rounds of {options.steps} steps each in rotation; medians (quartiles)"
        )
        figures = {"threads": threads, "milliseconds": {each.name: each.milliseconds for each in times}}
        return [table(times), note], figures

    return run_bench(options, measure)


def recipes_for(scratch: Path, overrides: list[str]) -> dict[str, Recipe]:
    """One recipe for every contender, by name; the floor first."""
    from jobs.objectives.terms.table import TERMS
    from jobs.recipe import load_recipe
    from jobs.recipe_checks import check

    fixed = [f"run.dir={scratch}", "model.hybrid.fusion=routed", "cluster.workers=1", "train.checkpoint_every=0"]
    plain = load_recipe("hybrid", ["train.zero_stage=0", *overrides, *fixed])
    check(plain)
    _save_reference(plain, scratch / "reference")
    found = {FLOOR: plain}
    for name in TERMS:
        for weight in (0.0, 1.0):
            keys = [f"objectives.weights={{{name}: {weight}}}", f"objectives.safety_reference={scratch / 'reference'}"]
            recipe = load_recipe("hybrid", ["train.zero_stage=0", *overrides, *fixed, *keys])
            check(recipe)
            found[f"{name}, weight {weight:.0f}"] = recipe
    return found


def _save_reference(recipe: Recipe, folder: Path) -> None:
    """The model that ``safety`` stays near: the one that training begins with."""
    from jobs.model_building import build_model

    build_model(recipe).save_pretrained(folder)


def step_times(recipes: dict[str, Recipe], scratch: Path, rounds: int, steps: int) -> list[Timings]:
    """Milliseconds per step of every contender, one for each round."""
    import torch

    from jobs.prepared_data import text_source
    from jobs.worker import TrainingWorker
    from mmada.data import load_tokenizer, prepare

    recipe = recipes[FLOOR]
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    prepared = prepare(text_source(recipe), tokenizer, scratch / "data", held_out=recipe.data.held_out).folder

    def contender(index: int, recipe: Recipe) -> Callable[[], float]:
        run_dir = scratch / str(index)
        (run_dir / "logs").mkdir(parents=True)
        worker = TrainingWorker(recipe, run_dir, prepared, torch.device("cpu"), lambda message: None)

        def some_steps() -> None:
            for _ in range(steps):
                worker.train_step(worker.stages.state.step)

        return lambda: time_of(some_steps) / steps

    with _alone():
        turns = {name: contender(index, recipe) for index, (name, recipe) in enumerate(recipes.items())}
        return [Timings(name, times) for name, times in in_turns(turns, rounds).items()]


@contextmanager
def _alone() -> Iterator[None]:
    """A process group of one, and the variable that DeepSpeed's engine asks for beside it."""
    from jobs.bench.moe import single_process_group

    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    try:
        with single_process_group():
            yield
    finally:
        del os.environ["LOCAL_RANK"]
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def table(times: list[Timings]) -> Table:
    """A row for every contender, with its ratio to the floor round by round."""
    from rich.table import Table

    from jobs.bench.measuring import quartiles

    found = Table(title="a step of training")
    for column in ("", "milliseconds", "times a step without terms"):
        found.add_column(column, justify="left" if not column else "right", no_wrap=True)
    floor = times[0]
    for each in times:
        ratio = "1" if each is floor else with_spread(each.ratios(floor))
        found.add_row(each.name, with_spread(quartiles(each.milliseconds)), ratio)
    return found
