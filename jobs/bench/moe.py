"""``mmada bench moe``: what one mixture-of-experts layer costs, beside its peers and beside a dense feed-forward.

Every contender runs forward and backward on the same tokens, in turns, in one process. The dense feed-forward has
the FLOPs that are active in the others, so its time is the floor: no routing, no copies, one big matrix product
after another. All ratios are taken within a round, as a busy machine slows a whole round.

# T tokens, D model width, F hidden width of an expert, E experts, K experts per token
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.argument_types import file_to_write, int_from
from jobs.bench.measuring import (
    MATMUL_SIZE,
    Timings,
    in_turns,
    matmul_flops,
    matmul_seconds,
    short,
    step_of,
    torch_threads,
    with_spread,
)
from jobs.cli import Parser

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

FLOOR, PEAK = "dense (the floor)", "matmul peak"


class Shape(NamedTuple):
    """Sizes of one layer and of its batch, written as DxFxExKxT."""

    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    num_tokens: int

    @property
    def flops(self) -> int:
        """Of one forward and backward pass: three projections, each one product forward and two backward."""
        return 18 * self.num_tokens * self.top_k * self.hidden_size * self.moe_intermediate_size

    @property
    def flops_of_all(self) -> int:
        """The same if every token went through every expert."""
        return self.flops // self.top_k * self.num_experts

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = (Shape(512, 1024, 16, 2, 2048), Shape(512, 256, 64, 4, 2048), Shape(256, 512, 64, 2, 512))


def run(args: list[str]) -> int:
    """Measure, print one table for each shape, write the JSON file if one is wanted; 0.

    Raises:
        CommandError: the arguments cannot be used.
    """
    options = parse(args)
    from rich.console import Console

    from cluster.terminal import quiet_terminal

    with (
        tempfile.TemporaryDirectory(prefix="mmada-bench-") as folder,
        quiet_terminal(Path(folder) / "log.txt") as terminal,
        single_process_group(),
        torch_threads(options.threads) as num_threads,
    ):
        console, records = Console(file=terminal, highlight=False, width=100), []
        for shape in options.shape or SHAPES:
            timings, flops = measure(shape, options.rounds)
            console.print(table(shape, timings, flops, num_threads), "")
            records.append(record(shape, timings, flops, num_threads))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return 0


def parse(args: Sequence[str]) -> argparse.Namespace:
    """The options of ``mmada bench moe``."""
    parser = Parser(prog="mmada bench moe", description="time a mixture-of-experts layer beside its peers")
    parser.add_argument("--rounds", type=int_from(2), default=15, metavar="N", help="timed rounds (default: 15)")
    parser.add_argument(
        "--shape",
        action="append",
        type=read_shape,
        metavar="DxFxExKxT",
        help=f"model width, expert width, experts, experts per token, tokens; may be given several times "
        f"(default: {', '.join(map(str, SHAPES))})",
    )
    parser.add_argument("--threads", type=int_from(1), metavar="N", help="threads of PyTorch (default: as it chooses)")
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write every single time there, too")
    return parser.parse_args(args)


def read_shape(text: str) -> Shape:
    """``512x1024x16x2x2048`` as a Shape; raises argparse.ArgumentTypeError."""
    parts = text.split("x")
    if len(parts) != len(Shape._fields) or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not five sizes DxFxExKxT; use {SHAPES[0]} or another")
    shape = Shape(*map(int, parts))
    if shape.top_k > shape.num_experts:
        raise argparse.ArgumentTypeError(f"{text} takes {shape.top_k} of {shape.num_experts} experts; use K up to E")
    return shape


@contextmanager
def single_process_group() -> Iterator[None]:
    """A process group of one, which DeepSpeed's layer asks for; no port is opened."""
    import deepspeed
    import torch.distributed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, and is not used
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        yield
    finally:
        torch.distributed.destroy_process_group()


def contenders(shape: Shape) -> dict[str, nn.Module]:
    """The layers to compare, by name; the floor comes first, ours second."""
    from deepspeed.moe.layer import MoE as DeepSpeedMoE
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    from mmada.config import MMaDAConfig
    from mmada.nn.ffn import FeedForward
    from mmada.nn.moe import MoE

    attention = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}  # not measured, but must be valid
    sizes = {
        "hidden_size": shape.hidden_size,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
    }

    def dense(intermediate_size: int) -> nn.Module:
        return FeedForward(MMaDAConfig(**sizes, **attention, intermediate_size=intermediate_size))

    def deepspeed_moe(**capacity: Any) -> nn.Module:
        expert = dense(shape.moe_intermediate_size)
        layer = DeepSpeedMoE(shape.hidden_size, expert, num_experts=shape.num_experts, k=shape.top_k, **capacity)
        layer.set_deepspeed_parallelism()
        return layer

    def transformers_moe(implementation: str) -> nn.Module:
        config = Qwen3MoeConfig(**sizes, norm_topk_prob=True)
        config._experts_implementation = implementation
        return Qwen3MoeSparseMoeBlock(config)

    layers = {
        FLOOR: dense(shape.top_k * shape.moe_intermediate_size),
        "mmada": MoE(MMaDAConfig(**sizes, **attention)),
        "DeepSpeed, none dropped": deepspeed_moe(drop_tokens=False),
        "DeepSpeed, capacity": deepspeed_moe(capacity_factor=1.25),
        "transformers, grouped": transformers_moe("grouped_mm"),
        "transformers, eager": transformers_moe("eager"),
    }
    for layer in layers.values():
        initialise(layer)
    return layers


def initialise(layer: nn.Module) -> None:
    """The same distribution for every parameter of every contender, so that all route about evenly."""
    from torch import nn

    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)


def measure(shape: Shape, rounds: int) -> tuple[dict[str, Timings], dict[str, int]]:
    """Time every contender and one big matrix product, in turns; and count the operations of every contender."""
    import torch

    from jobs.bench.counting import count_flops

    torch.manual_seed(0)
    hidden = torch.randn(1, shape.num_tokens, shape.hidden_size, requires_grad=True)
    layers = contenders(shape)
    steps = {name: step_of(layer, hidden) for name, layer in layers.items()}
    measured = in_turns({**steps, PEAK: lambda: 1e3 * matmul_seconds()}, rounds)
    timings = {name: Timings(name, milliseconds) for name, milliseconds in measured.items()}
    return timings, {name: count_flops(step)[0] for name, step in steps.items()}


def peak_flops(timings: dict[str, Timings]) -> float:
    """FLOP/s of the best big matrix product in the run."""
    return matmul_flops(1e-3 * timings[PEAK].best)


def table(shape: Shape, timings: dict[str, Timings], flops: dict[str, int], num_threads: int) -> Table:
    """What is printed of one shape."""
    from rich import box
    from rich.table import Table

    peak, floor = peak_flops(timings), timings[FLOOR]
    title = (
        f"width {shape.hidden_size}, expert width {shape.moe_intermediate_size}, {shape.num_experts} experts, "
        f"top {shape.top_k}, {shape.num_tokens} tokens"
    )
    caption = (
        f"forward and backward in ms, float32, {num_threads} threads, {len(floor.milliseconds)} rounds in turns;\n"
        f"times the floor of the same round: median (quartiles), then best over best;\n"
        f"operations counted, the router's too, and as a share of what all {shape.num_experts} experts would take on "
        f"every token (k / E = {shape.top_k / shape.num_experts:.1%});\n"
        f"share of {peak / 1e9:.0f} GFLOP/s, the best matrix product of {MATMUL_SIZE} squared, at the best time"
    )
    result = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("layer", no_wrap=True, min_width=23)
    for heading in ("median", "best", "times the floor", "best", "GFLOP", "of all", "peak"):
        result.add_column(heading, justify="right", no_wrap=True)
    for name, each in timings.items():
        if name == PEAK:
            continue
        result.add_row(
            name,
            short(each.median),
            short(each.best),
            with_spread(each.ratios(floor)),
            short(each.best / floor.best),
            short(flops[name] / 1e9),
            f"{flops[name] / shape.flops_of_all:.1%}",
            f"{shape.flops / (1e-3 * each.best) / peak:.0%}",
        )
    return result


def record(shape: Shape, timings: dict[str, Timings], flops: dict[str, int], num_threads: int) -> dict[str, Any]:
    """The same, for a program, with every single time."""
    return {
        "shape": shape._asdict(),
        "threads": num_threads,
        "flops": shape.flops,
        "matmul_peak_flops_per_second": peak_flops(timings),
        "layers": {
            name: {
                "median_ms": each.median,
                "best_ms": each.best,
                "floor_ratio_quartiles": each.ratios(timings[FLOOR]),
                "milliseconds": each.milliseconds,
                "flops": flops[name],
                "share_of_all_experts": flops[name] / shape.flops_of_all,
            }
            for name, each in timings.items()
            if name != PEAK
        },
    }
