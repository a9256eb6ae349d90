"""``mmada bench patches``: how often the stack of blocks runs for a byte, and what a byte costs, by how they are cut.

Counted, not timed, on held-out text of a recipe. The rule on entropies asks a small model of bytes: a trained one, or
one that is trained here first. Its threshold is found on training text, so that patches have ``patches.size`` bytes.
"""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.argument_types import int_from
from jobs.bench.measuring import bench_parser, in_units, run_bench, short
from jobs.cli import CommandError
from jobs.recipe import load_recipe
from jobs.wording import suggestion

if TYPE_CHECKING:
    from rich.table import Table

    from mmada.data import PackedRows, PreparedText

NONE = "none"
MODES = (NONE, "static", "space", "entropy", "monotonic", "combined")
ENTROPY_MODEL = "entropy model"
BYTE_SIDE = ("embeddings", "byte encoder", "patch pooling", "byte decoder", "head", "loss")
ROWS_PER_PASS = 16


def run(arguments: list[str]) -> int:
    """Count and print one table; 0. Raises CommandError and RecipeError for what cannot be used."""
    parser = bench_parser(
        "patches", "steps of the stack and operations for a byte, by the rule of patches", rounds=None
    )
    parser.add_argument("--recipe", default="bytes", metavar="RECIPE", help="a model with byte patches (bytes)")
    parser.add_argument("--modes", default="static,space,entropy", metavar="A,B", help="rules (static,space,entropy)")
    parser.add_argument("--entropy-model", metavar="DIR", help="a trained model of bytes (default: train one first)")
    parser.add_argument(
        "--entropy-steps", type=int_from(1), default=300, metavar="N", help="steps to train one for (300)"
    )
    parser.add_argument("--rows", type=int_from(1), default=128, metavar="N", help="held-out rows to read (128)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for mmada train, for --recipe")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.entropy_steps = 2, 2
        options.overrides = ["data.limit_documents=20", "train.sequence_length=64", *options.overrides]
    modes = [NONE, *options.modes.split(",")]
    for mode in modes:
        if mode not in MODES:
            raise CommandError(f"--modes={mode} is no rule of patches; {suggestion(mode, MODES)}")
    load_recipe(options.recipe, options.overrides)  # refused, if at all, before anything is trained

    def measure(threads: int) -> tuple[list[Any], Any]:
        with tempfile.TemporaryDirectory(prefix="mmada-bench-") as scratch:
            figures, words = count_all(options, modes, Path(scratch))
        return [table(figures), words], {"modes": figures, "entropy_model": words, "threads": threads}

    return run_bench(options, measure)


def count_all(options: Any, modes: list[str], scratch: Path) -> tuple[dict[str, dict[str, float]], str]:
    """The figures of every rule, and what is to be said about the entropy model and the text."""
    from jobs.entropy_model import settle_threshold
    from jobs.model_building import build_model
    from jobs.prepared_data import text_source
    from jobs.recipe_checks import check
    from mmada.config_parts import ENTROPY_MODES
    from mmada.data import load_tokenizer, prepare

    recipe = load_recipe(options.recipe, [*options.overrides, "model.patches.mode=static"])
    prepared = prepare(text_source(recipe), load_tokenizer("bytes"), scratch / "data", held_out=recipe.data.held_out)
    length = recipe.train.sequence_length
    train, held_out = prepared.train.rows(length), prepared.held_out.rows(length)
    num_rows = min(options.rows, len(held_out) - 1)  # the last row is filled up with padding
    words = f"{num_rows * length:,} bytes of held-out text ({recipe.data.source}) in rows of {length}"
    folder = options.entropy_model
    if {*modes} & {*ENTROPY_MODES} and folder is None:
        folder, bits = train_entropy_model(options, prepared, scratch)
        words += (
            f"; entropies of a model of bytes after {options.entropy_steps} steps, {bits:.2f} bits per byte on them"
        )
    figures = {}
    for mode in modes:
        asked = [f"model.entropy_model={folder}"] if mode in ENTROPY_MODES else []
        own = load_recipe(options.recipe, [*options.overrides, f"model.patches.mode={mode}", *asked])
        check(own)
        model = build_model(own).eval()
        settle_threshold(model, train, saved=None)
        figures[mode] = count(model, held_out, num_rows)
    return figures, words


def train_entropy_model(options: Any, prepared: PreparedText, scratch: Path) -> tuple[str, float]:
    """A model of bytes trained for a while, by the recipe of that name: its folder, and its bits per held-out byte."""
    import torch

    from jobs.bare_loop import BareLoop, text_batches
    from mmada.data import load_tokenizer

    steps = options.entropy_steps
    recipe = load_recipe("entropy-model", [f"train.steps={steps}", f"train.warmup_steps={min(60, steps // 10)}"])
    loop = BareLoop(recipe, text_batches(recipe, prepared.folder))
    for step in range(steps):
        loop.step(step)
    folder = scratch / "entropy-model"
    loop.model.eval().save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    rows = prepared.held_out.rows(recipe.train.sequence_length)
    with torch.no_grad():
        losses = [
            loop.model(**batch, use_cache=False).loss.item() for batch in batches(rows, min(options.rows, len(rows)))
        ]
    return str(folder), sum(losses) / len(losses) / math.log(2)


def batches(rows: PackedRows, num_rows: int) -> list[dict[str, Any]]:
    """The first rows, some at a time."""
    import numpy as np

    return [
        rows.batch(np.arange(first, min(first + ROWS_PER_PASS, num_rows)))
        for first in range(0, num_rows, ROWS_PER_PASS)
    ]


def count(model: Any, rows: PackedRows, num_rows: int) -> dict[str, float]:
    """Bytes per patch, and the operations of a forward pass for each byte: of the stack, around it, and to cut."""
    import torch

    from jobs.bench.counting import count_flops
    from jobs.profiling.parts import take_apart

    num_bytes, num_patches, flops = 0, 0, {"stack": 0, "bytes": 0, "entropy": 0}
    for batch in batches(rows, num_rows):
        with torch.no_grad():
            found = model(**batch, use_cache=False).num_patches
        num_bytes += batch["input_ids"].numel()
        num_patches += batch["input_ids"].numel() if found is None else int(found.sum())
        for part in take_apart(model, {**batch, "use_cache": False}):
            where = "entropy" if part.name == ENTROPY_MODEL else "bytes" if part.name in BYTE_SIDE else "stack"
            flops[where] += count_flops(partial(part.forward, part.inputs()))[0]
    per_byte = {f"flops_{where}": each / num_bytes for where, each in flops.items()}
    return {
        "bytes_per_patch": num_bytes / num_patches,
        "steps_per_byte": num_patches / num_bytes,
        **per_byte,
        "flops": sum(per_byte.values()),
    }


def table(figures: dict[str, dict[str, float]]) -> Table:
    """A row for each rule; the first is the stack on bytes."""
    from jobs.plan_report import table_of

    counted = ("stack", "byte side", "entropy model", "all", "times plain")
    result = table_of("patches; FLOP for a byte", "bytes", "stack runs/byte", *counted)
    plain = figures[NONE]["flops"]
    for mode, each in figures.items():
        result.add_row(
            "none (plain bytes)" if mode == NONE else mode,
            short(each["bytes_per_patch"]),
            f"{each['steps_per_byte']:.3f}",
            *(in_units(each[name]) for name in ("flops_stack", "flops_bytes", "flops_entropy", "flops")),
            short(each["flops"] / plain),
        )
    return result
