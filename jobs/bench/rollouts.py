"""``mmada bench rollouts``: what sampling and learning from samples cost, beside transformers and TRL.

Parts: ``generation`` (tokens per second beside transformers' ``generate``), ``grpo`` (a whole step of the algorithm
beside TRL's trainer, on the same weights), ``growth`` (samples per second by the number of actors) and ``publish``
(seconds until all actors have new weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jobs.argument_types import int_from
from jobs.bench.measuring import bench_parser, run_bench, whole_numbers
from jobs.cli import CommandError

PARTS = ("generation", "grpo", "growth", "publish")
ALL = "all"


def run(arguments: list[str]) -> int:
    """Measure and print a table for each part; 0. Raises CommandError for arguments and for a missing TRL."""
    options = parse(arguments)
    wanted = PARTS if options.part == ALL else (options.part,)
    return run_bench(options, lambda threads: measure_parts(wanted, options, threads))


def measure_parts(wanted: Sequence[str], options: Any, threads: int) -> tuple[list[Any], dict[str, Any]]:
    """What to print of these parts, and their figures by name; a peer that is missing is fatal to its part alone.

    Raises CommandError where that is the only one.
    """
    parts: dict[str, Callable[[Any, int], tuple[list[Any], Any]]] = {
        "generation": generation,
        "grpo": grpo,
        "growth": growth,
        "publish": publish,
    }
    printed: list[Any] = []
    figures: dict[str, Any] = {"threads": threads}
    for name in wanted:
        try:
            tables, figures[name] = parts[name](options, threads)
        except CommandError as error:
            if len(wanted) == 1:
                raise
            tables, figures[name] = [f"{name}: not measured: {error}"], None
        printed += [*tables, ""]
    return printed, figures


def parse(arguments: list[str]) -> Any:
    """The options of ``mmada bench rollouts``."""
    parser = bench_parser(
        "rollouts", "sampling, a GRPO step, growth and weights, beside transformers and TRL", rounds=5
    )
    parser.add_argument("--part", choices=(ALL, *PARTS), default=ALL, help=f"what to measure ({ALL})")
    for name, default, meaning in (
        ("width", 128, "model width"),
        ("layers", 4, "layers"),
        ("prompts", 64, "prompts of the generation part"),
        ("new-tokens", 64, "longest completion of the generation part"),
        ("end-ids", 8, "ids of the vocabulary's 264 that end a completion there: one token in 33 is such a one"),
        ("slots", 32, "rows that are decoded at a time"),
        ("samples", 8, "completions of each prompt in the grpo part"),
        ("groups", 4, "prompts of a grpo step"),
        ("completion", 32, "tokens of each of its completions"),
        ("actors", 4, "actors that take weights up"),
    ):
        parser.add_argument(f"--{name}", type=int_from(1), default=default, metavar="N", help=f"{meaning} ({default})")
    for name, numbers, meaning in (
        ("lengths", [16, 96], "shortest and longest prompt of the generation part"),
        ("sizes", [1, 2, 4, 8, 16, 32], "actors that sample"),
        ("weights", [10**6, 10**7, 10**8], "bytes of weights"),
    ):
        shown = ",".join(map(str, numbers))
        parser.add_argument(
            f"--{name}", type=whole_numbers, default=numbers, metavar="A,B", help=f"{meaning} ({shown})"
        )
    options = parser.parse_args(arguments)
    if options.quick:
        options.width, options.layers, options.rounds = 32, 2, 2
        options.prompts, options.new_tokens, options.slots, options.lengths = 6, 6, 4, [2, 9]
        options.samples, options.groups, options.completion = 2, 2, 4
        options.sizes, options.weights, options.actors = [1, 2], [1000], 2
    if len(options.lengths) != 2 or options.lengths[0] > options.lengths[1]:
        raise CommandError(f"--lengths={options.lengths} is no shortest and longest prompt; use 16,96, say")
    if options.width % 32:
        raise CommandError(f"--width={options.width} is not made of heads of 32; use 128, say")
    if options.end_ids > 255:
        raise CommandError(f"--end-ids={options.end_ids} leaves no id that goes on; use 8, say")
    return options


def generation(options: Any, threads: int) -> tuple[list[Any], Any]:
    """Tokens per second beside ``generate``."""
    from jobs.bench.generation import caption, contenders, measure, record, table

    taken = measure(contenders(options), options)
    return [table(options, taken), caption(options, threads)], record(options, taken)


def grpo(options: Any, threads: int) -> tuple[list[Any], Any]:
    """Milliseconds of a step beside TRL's."""
    from jobs.bench.grpo import caption, measure, record, table

    timings = measure(options)
    return [table(timings), caption(options, threads)], record(options, timings)


def growth(options: Any, threads: int) -> tuple[list[Any], Any]:
    """Samples per second by the number of actors."""
    from dataclasses import asdict

    from jobs.bench.growth import growth_table, measure_growth

    rows = measure_growth(options.sizes, 0.05, 2) if options.quick else measure_growth(options.sizes)
    return ["how sampling grows, with policies that sleep", growth_table(rows)], [asdict(row) for row in rows]


def publish(options: Any, threads: int) -> tuple[list[Any], Any]:
    """Seconds until all actors have new weights."""
    from dataclasses import asdict

    from jobs.bench.growth import measure_publish, publish_table

    rows = measure_publish(options.weights, options.actors, options.rounds)
    return ["how long new weights take", publish_table(rows)], [asdict(row) for row in rows]
