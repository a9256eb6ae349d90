"""``mmada bench attention``: windows in bands beside a masked kernel, what kernels keep, and how large caches get."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from jobs.argument_types import int_from
from jobs.bench.measuring import bench_parser, log_slope, run_bench, short, whole_numbers
from jobs.cli import CommandError

if TYPE_CHECKING:
    from rich.table import Table

BANDED, MASKED, FULL = "window in bands (mmada)", "window as a mask (SDPA)", "no window, causal (SDPA)"
EAGER, BLOCKWISE, FUSED = "eager", "blockwise (mmada)", "SDPA"


def run(arguments: list[str]) -> int:
    """Measure and print the tables; 0. Raises CommandError for arguments that do not go together."""
    parser = bench_parser("attention", "windows, memory and caches of attention", rounds=7)
    for name, default, meaning in (
        ("heads", 4, "query heads"),
        ("kv-heads", 2, "key/value heads"),
        ("head-dim", 64, "width of a head"),
        ("window", 256, "tokens that a query sees, itself among them"),
        ("cache-length", 2048, "tokens in the cache"),
        ("cache-window", 1024, "window of the cache's window layers"),
    ):
        parser.add_argument(f"--{name}", type=int_from(1), default=default, metavar="N", help=f"{meaning} ({default})")
    timed = "rows of so many tokens are timed (2048,4096,8192)"
    parser.add_argument("--lengths", type=whole_numbers, default=[2048, 4096, 8192], metavar="A,B", help=timed)
    kept = "rows whose kept bytes are counted (512,1024,2048,4096)"
    parser.add_argument("--kept-lengths", type=whole_numbers, default=[512, 1024, 2048, 4096], metavar="A,B", help=kept)
    options = parser.parse_args(arguments)
    if options.quick:
        options.heads, options.kv_heads, options.head_dim, options.window, options.rounds = 2, 1, 8, 32, 2
        options.lengths, options.kept_lengths = [64, 128], [64, 128]
        options.cache_length, options.cache_window = 128, 64
    if options.heads % options.kv_heads:
        raise CommandError(f"--kv-heads={options.kv_heads} does not divide --heads={options.heads}; use 1, say")

    def measure(threads: int) -> tuple[list[Any], Any]:
        printed, figures = window_race(options, threads)
        kept, caches = kept_bytes(options), cache_sizes(options.cache_length, options.cache_window)
        printed += [kept_table(options, kept), cache_table(options, caches)]
        return printed, {**figures, "kept": kept, "caches": caches}

    return run_bench(options, measure)


def window_race(options: argparse.Namespace, threads: int) -> tuple[list[Any], dict[str, Any]]:
    """Time over length of a window that is computed in bands, as a mask, and of no window at all."""
    from jobs.bench.attention_kernels import Heads, Kernel, MaskedSDPA
    from jobs.bench.lengths import Runner, caption, race, race_record, race_table

    heads = Heads(options.heads, options.kv_heads, options.head_dim)
    runners = [
        Runner(BANDED, Kernel(heads, "sdpa", options.window), peers=(MASKED, FULL)),
        Runner(MASKED, MaskedSDPA(heads, options.window)),
        Runner(FULL, Kernel(heads, "sdpa")),
    ]
    times = race(runners, options.lengths, 1, heads.width, options.rounds)
    title = f"attention alone: {heads.num_heads} heads of {heads.head_dim}, window {options.window}"
    printed = [race_table(title, runners, times, batch=1), caption(threads, options.rounds)]
    sizes = {"heads": vars(heads), "window": options.window, "threads": threads}
    return printed, {**sizes, **race_record(runners, times, batch=1)}


def kept_bytes(options: argparse.Namespace) -> dict[str, dict[int, int]]:
    """Bytes that each kernel keeps for the backward pass, by length; counted, so the same in every run."""
    from jobs.bench.attention_kernels import Heads, Kernel, saved_bytes

    heads = Heads(options.heads, options.kv_heads, options.head_dim)
    kernels = {EAGER: Kernel(heads, "eager"), BLOCKWISE: Kernel(heads, "blockwise"), FUSED: Kernel(heads, "sdpa")}
    return {
        name: {length: saved_bytes(kernel, heads.width, length) for length in options.kept_lengths}
        for name, kernel in kernels.items()
    }


def kept_table(options: argparse.Namespace, kept: dict[str, dict[int, int]]) -> Table:
    """A row for each kernel, the ratio to the plain formula below it."""
    from jobs.plan import gib
    from jobs.plan_report import table_of

    lengths = options.kept_lengths
    table = table_of("kept for the backward pass, one row of", *(f"{length:,}" for length in lengths), "grows as")
    for name, by_length in kept.items():
        power = f"T^{log_slope(lengths, list(by_length.values())):.2f}" if len(lengths) > 1 else ""
        table.add_row(name, *(gib(by_length[length]) for length in lengths), power)
        if name != EAGER:
            ratios = [kept[EAGER][length] / by_length[length] for length in lengths]
            table.add_row(f"  {EAGER} keeps times", *map(short, ratios), style="bold")
    return table


def cache_sizes(length: int, window: int) -> dict[str, dict[str, int]]:
    """Bytes in the caches of small models of 16 query heads, and what the formula says.

    Keys and values of every layer: 2 · key/value heads · head_dim · 4 bytes for each token that it keeps.
    """
    from jobs.bench.attention_kernels import cache_bytes

    shape = {"hidden_size": 128, "num_attention_heads": 16, "head_dim": 8, "intermediate_size": 16, "vocab_size": 264}
    models = {
        "16 key/value heads": (16, "attention,attention"),
        "8": (8, "attention,attention"),
        "4": (4, "attention,attention"),
        f"16, window {window} in all layers": (16, "window,window"),
        f"8, window {window} in every second layer": (8, "window,attention"),
        f"8, window {window} in all layers": (8, "window,window"),
        f"4, window {window} in all layers": (4, "window,window"),
    }
    found = {}
    for name, (heads, kinds) in models.items():
        tokens = [min(length, window) if kind == "window" else length for kind in kinds.split(",")]
        settings = {"num_hidden_layers": 2, "mixer_types": kinds, "sliding_window": window}
        found[name] = {
            "bytes": cache_bytes(length, num_key_value_heads=heads, **shape, **settings),
            "formula": 2 * heads * 8 * 4 * sum(tokens),
        }
    return found


def cache_table(options: argparse.Namespace, caches: dict[str, dict[str, int]]) -> Table:
    """A row for each model, with what it saves against as many key/value heads as query heads."""
    from jobs.plan import gib
    from jobs.plan_report import table_of

    table = table_of(f"cache after {options.cache_length:,} tokens", "measured", "2·G·K·4·tokens", "smaller by")
    full = next(iter(caches.values()))["bytes"]
    for name, sizes in caches.items():
        table.add_row(name, gib(sizes["bytes"]), gib(sizes["formula"]), f"{1 - sizes['bytes'] / full:.2%}")
    return table
