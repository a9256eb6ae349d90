"""``mmada study``: train the variants of one recipe with several seeds, and say what can be told apart.

Each trial is an ordinary training in a process of its own with one thread, without Ray: the models are small, and
only their comparison counts. (Trials of reinforcement learning are whole runs, one after the other.) Every variant
meets the same seeds, so differences are taken seed by seed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.argument_types import file_to_write, int_from
from jobs.cli import Parser
from jobs.recipe import Recipe, load_recipe
from jobs.recipe_checks import check
from jobs.studies.catalogue import STUDIES
from jobs.studies.intervals import Interval, interval, verdict
from jobs.studies.study import Claim, PolicyTask, Study, TextTask
from jobs.studies.trial import Trial, run_trial, save_untrained, train_first

Results = dict[str, dict[int, dict[str, float]]]  # variant, seed, measure


def run(name: str, arguments: list[str], *, verb: str = "study", seeds: int = 3) -> int:
    """Carry out a study and print its tables; ``arguments`` are the command line's."""
    parser = Parser(prog=f"mmada {verb} {name}", description=STUDIES[name].title)
    parser.add_argument(
        "--seeds", type=int_from(2), default=seeds, metavar="N", help=f"seeds of each variant (default: {seeds})"
    )
    parser.add_argument(
        "--processes", type=int_from(1), metavar="N", help="trials at a time, one thread each (default: one per core)"
    )
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write every number to this file too")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="set in all variants")
    options = parser.parse_intermixed_args(arguments)  # keys may stand before and behind options
    console = Console(highlight=False, width=110)
    study = STUDIES[name]
    at_once = 1 if isinstance(study.task, PolicyTask) else options.processes or os.cpu_count() or 1
    carry_out(study, options.seeds, at_once, options, console)
    return 0


def carry_out(study: Study, seeds: int, processes: int, options: Any, console: Console) -> None:
    """Train and measure all trials, and show what was found; ``options`` has ``json`` and ``overrides``."""
    overrides = options.overrides
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mmada-study-") as scratch:
        first = Path(scratch) / "first"
        if study.first:
            save_untrained(load_recipe(study.first), first)  # so that what names it can be checked
        for variant in study.variants:
            check_variant(study, load_recipe(study.recipe, [*study.overrides(variant, 0, str(first)), *overrides]))
        prepared = _prepare(study, overrides, Path(scratch))
        if study.first:
            console.print(f"training {study.first}, which the variants need …")
            train_first(load_recipe(study.first, _data_keys(overrides)), Path(prepared or ""), first)
        trials = [
            Trial(study, variant, seed, overrides, prepared, str(first))
            for seed in range(seeds)
            for variant in study.variants
        ]
        results = _run_trials(study, trials, processes, console)
    minutes = (time.perf_counter() - started) / 60
    console.print(results_table(study, results))
    console.print(claims_table(study, results))
    recipe = load_recipe(study.recipe, [*study.common, *overrides])
    train, ppo = recipe.train, recipe.ppo
    work = f"{train.steps} steps of {train.global_batch} rows of {train.sequence_length} tokens"
    if isinstance(study.task, PolicyTask) and ppo is not None:
        work += f", then {ppo.iterations} iterations of {ppo.prompts_per_iteration} × {ppo.samples_per_prompt} samples"
    console.print(
        f"recipe {study.recipe}, {work}; seeds 0 to {seeds - 1}; mean ± half of the 95 % interval "
        f"(Student's t); {minutes:.0f} min with {processes} processes"
    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def check_variant(study: Study, recipe: Recipe) -> None:
    """Raise RecipeError unless the variant can be run."""
    if not isinstance(study.task, PolicyTask):
        check(recipe)
        return
    from jobs.recipe_checks_ppo import check_ppo, completed

    check_ppo(completed(recipe))


def _prepare(study: Study, overrides: list[str], scratch: Path) -> str | None:
    """The text of the recipe on disk; None where the task makes its own rows."""
    if not isinstance(study.task, TextTask):
        return None
    from jobs.prepared_data import text_source
    from mmada.data import load_tokenizer, prepare

    recipe = load_recipe(study.recipe, [*study.common, *overrides])
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    return str(prepare(text_source(recipe), tokenizer, scratch, held_out=recipe.data.held_out).folder)


def _data_keys(overrides: list[str]) -> list[str]:
    """What is set of the text, which the model trained first reads too."""
    return [override for override in overrides if override.startswith("data.")]


def _run_trials(study: Study, trials: list[Trial], processes: int, console: Console) -> Results:
    results: Results = {variant: {} for variant in study.variants}
    console.print(f"{study.title}: {len(trials)} trials, {processes} at a time")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        running = {pool.submit(run_trial, trial): trial for trial in trials}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                trial, found = running[future], future.result()
                results[trial.variant][trial.seed] = found
                shown = ", ".join(f"{name} {found[name]:.3f}" for name in study.task.measures())
                console.print(f"  {done}/{len(trials)}  {trial.variant}, seed {trial.seed}: {shown}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return results


def results_table(study: Study, results: Results) -> Table:
    """A row for each variant, a column for each measure."""
    table = Table(title=f"{study.title}: {study.task.unit}")
    table.add_column("", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for measure in study.task.measures():
        table.add_column(measure, justify="right", no_wrap=True)
    for variant, by_seed in results.items():
        cells = [_shown(interval([found[measure] for found in by_seed.values()])) for measure in study.task.measures()]
        parameters = next(iter(by_seed.values()))["parameters"]
        table.add_row(variant, f"{parameters:,.0f}", *cells)
    return table


def claims_table(study: Study, results: Results) -> Table:
    """What the sources say, and what was found."""
    table = Table(title="What is claimed elsewhere, and what was found here")
    table.add_column("claim", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    table.add_column("found")
    for claim in study.claims:
        gain = gain_of(study, claim, results)
        table.add_row(claim.words(), _shown(gain), verdict(gain, claim.margin))
    return table


def gain_of(study: Study, claim: Claim, results: Results) -> Interval:
    """How much better ``claim.better`` did than ``claim.worse``, seed by seed."""
    better, worse = results[claim.better], results[claim.worse]
    is_lower = study.lower_is_better if claim.lower_is_better is None else claim.lower_is_better
    sign = -1.0 if is_lower else 1.0
    other: Any = claim.worse_measure or claim.measure
    return interval([sign * (better[s][claim.measure] - claim.share * worse[s][other]) for s in sorted(better)])


def _shown(value: Interval) -> str:
    if abs(value.mean) >= 100:
        return f"{value.mean:.0f} ± {value.half_width:.0f}"
    if 0 < abs(value.mean) < 0.01:
        return f"{value.mean:.3g} ± {value.half_width:.2g}"
    return f"{value.mean:.3f} ± {value.half_width:.3f}"
