"""``mmada bench memory``: the neural memory's layer beside titans-pytorch's, at the same sizes.

The paper's chunk (tokens whose gradients are taken at the same weights) is called ``batch_size`` there, while its
``chunk_size`` is the span that shares a gate: 1 gives every token gates and weights of its own, as the paper has it and
as ours does. Beside it stands the form in which whole chunks share gates and weights, which computes less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.argument_types import int_from
from jobs.bench.measuring import bench_parser, peer, run_bench, whole_numbers
from jobs.cli import CommandError

if TYPE_CHECKING:
    from torch import nn

PACKAGE = "titans-pytorch"
OURS, PER_TOKEN, PER_CHUNK = "mmada", "titans-pytorch, gates per token", "titans-pytorch, gates per chunk"


def run(arguments: list[str]) -> int:
    """Measure and print one table; 0. Raises CommandError for arguments, and where the peer is not installed."""
    parser = bench_parser("memory", "the neural memory beside titans-pytorch's", rounds=7)
    for name, default, meaning in (
        ("width", 128, "model width"),
        ("heads", 4, "memories side by side"),
        ("head-dim", 32, "width of keys and values"),
        ("depth", 2, "layers of a memory"),
        ("expansion", 2, "hidden width of a memory over the width of its keys"),
        ("chunk", 16, "tokens whose gradients are taken at the same weights"),
        ("batch", 1, "rows"),
    ):
        parser.add_argument(f"--{name}", type=int_from(1), default=default, metavar="N", help=f"{meaning} ({default})")
    parser.add_argument(
        "--lengths", type=whole_numbers, default=[256, 512, 1024], metavar="A,B", help="tokens of a row (256,512,1024)"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.width, options.heads, options.head_dim, options.chunk = 16, 2, 8, 4
        options.lengths, options.rounds = [8, 16], 2
    for length in options.lengths:
        if length % options.chunk:
            raise CommandError(f"--lengths={length} is not a multiple of --chunk={options.chunk}, as the peer wants it")
    theirs = peer("titans_pytorch", PACKAGE)

    def measure(threads: int) -> tuple[list[Any], Any]:
        from jobs.bench.lengths import Runner, caption, race, race_record, race_table

        runners = [
            Runner(OURS, ours(options), peers=(PER_TOKEN, PER_CHUNK)),
            Runner(PER_TOKEN, titans(theirs, options, shared=1)),
            Runner(PER_CHUNK, titans(theirs, options, shared=options.chunk)),
        ]
        times = race(runners, options.lengths, options.batch, options.width, options.rounds)
        title = (
            f"memory: width {options.width}, {options.heads} heads of {options.head_dim}, depth {options.depth}, "
            f"chunk {options.chunk}"
        )
        printed = [race_table(title, runners, times, options.batch), caption(threads, options.rounds)]
        return printed, {"sizes": sizes(options), "threads": threads, **race_record(runners, times, options.batch)}

    return run_bench(options, measure)


def sizes(options: Any) -> dict[str, int]:
    """What both layers are built with."""
    return {name: getattr(options, name) for name in ("width", "heads", "head_dim", "depth", "expansion", "chunk")}


def ours(options: Any) -> nn.Module:
    """The ``memory`` mixer, without what the peer is not told to do: convolution, persistent tokens, limits."""
    from jobs.bench.lengths import mixer_alone

    memory = {
        "depth": options.depth,
        "expansion": options.expansion,
        "num_heads": options.heads,
        "head_dim": options.head_dim,
        "chunk_size": options.chunk,
        "convolution": False,
        "max_gradient_norm": None,
        "num_persistent_tokens": 0,
    }
    return mixer_alone("memory", hidden_size=options.width, num_attention_heads=1, memory=memory)


def titans(module: Any, options: Any, shared: int) -> nn.Module:
    """The peer with the same inner memory: no residual, no norms, momentum and forgetting as ours."""
    import torch

    torch.manual_seed(0)
    return module.NeuralMemory(
        dim=options.width,
        dim_head=options.head_dim,
        heads=options.heads,
        chunk_size=shared,
        batch_size=options.chunk,
        momentum=True,
        mem_model_norm_add_residual=False,
        pre_rmsnorm=False,
        use_accelerated_scan=False,
        default_model_kwargs={"depth": options.depth, "expansion_factor": float(options.expansion)},
    )
