"""``mmada bench ssm``: both state-space forms beside transformers' layers of the same sizes, at growing lengths.

transformers runs them in plain PyTorch where its CUDA kernels are missing: Mamba-2 in chunks, Mamba in a loop over
tokens, whose backward pass touches the whole sequence at every token and is therefore run at short lengths only. The
chunk changes no value, so Mamba-2 stands there twice: with the chunk of ours and with its own default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.argument_types import int_from
from jobs.bench.measuring import bench_parser, run_bench, whole_numbers
from jobs.cli import CommandError

if TYPE_CHECKING:
    from torch import nn

SSD, SCAN = "ssd (mmada)", "selective scan (mmada)"
MAMBA2, MAMBA = "Mamba2Mixer", "MambaMixer"


def run(arguments: list[str]) -> int:
    """Measure and print one table; 0. Raises CommandError for arguments that do not go together."""
    parser = bench_parser("ssm", "state-space layers beside transformers' plain PyTorch ones", rounds=5)
    for name, default, meaning in (
        ("width", 128, "model width; twice that inside"),
        ("state", 16, "numbers kept per channel"),
        ("head-dim", 32, "channels of an ssd head"),
        ("chunk", 32, "tokens of an ssd chunk"),
        ("peer-chunk", 256, "tokens of a chunk in the second Mamba2Mixer, as transformers has it"),
        ("batch", 1, "rows"),
        ("loop-length", 1024, "longest sequence for MambaMixer's loop"),
    ):
        parser.add_argument(f"--{name}", type=int_from(1), default=default, metavar="N", help=f"{meaning} ({default})")
    parser.add_argument(
        "--lengths",
        type=whole_numbers,
        default=[512, 1024, 2048, 4096, 8192],
        metavar="A,B",
        help="tokens (512,1024,2048,4096,8192)",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.width, options.state, options.head_dim, options.chunk = 16, 4, 8, 8
        options.peer_chunk = 16
        options.lengths, options.loop_length, options.rounds = [8, 16, 32], 16, 2
    if 2 * options.width % options.head_dim:
        raise CommandError(f"--head-dim={options.head_dim} does not divide twice --width={options.width}; use 32, say")

    def measure(threads: int) -> tuple[list[Any], Any]:
        from jobs.bench.lengths import Runner, caption, race, race_record, race_table

        same, default = (f"{MAMBA2}, chunk {chunk}" for chunk in (options.chunk, options.peer_chunk))
        chunks = {same: options.chunk, default: options.peer_chunk}  # one, where both are alike
        runners = [
            Runner(SSD, ours("ssd", options), peers=tuple(chunks)),
            *(Runner(name, mamba2(options, chunk)) for name, chunk in chunks.items()),
            Runner(SCAN, ours("selective_scan", options), peers=(MAMBA,)),
            Runner(MAMBA, mamba(options), longest=options.loop_length),
        ]
        times = race(runners, options.lengths, options.batch, options.width, options.rounds)
        sized = f"width {options.width}, state {options.state}, heads of {options.head_dim}, chunk {options.chunk}; "
        printed = [race_table("state space", runners, times, options.batch), sized + caption(threads, options.rounds)]
        names = ("width", "state", "head_dim", "chunk", "peer_chunk", "loop_length")
        sizes = {name: getattr(options, name) for name in names}
        return printed, {"sizes": sizes, "threads": threads, **race_record(runners, times, options.batch)}

    return run_bench(options, measure)


def ours(form: str, options: Any) -> nn.Module:
    """The ``ssm`` mixer in one of its forms."""
    from jobs.bench.lengths import mixer_alone

    ssm = {"form": form, "state_size": options.state, "head_dim": options.head_dim, "chunk_size": options.chunk}
    return mixer_alone("ssm", hidden_size=options.width, num_attention_heads=1, ssm=ssm)


def mamba2(options: Any, chunk_size: int) -> nn.Module:
    """transformers' layer; without the kernels of mamba-ssm it computes in PyTorch."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=options.width,
        state_size=options.state,
        head_dim=options.head_dim,
        num_heads=2 * options.width // options.head_dim,
        n_groups=1,
        expand=2,
        chunk_size=chunk_size,
        num_hidden_layers=1,
    )
    return Mamba2Mixer(config, layer_idx=0)


def mamba(options: Any) -> nn.Module:
    """transformers' layer, its loop over tokens."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return MambaMixer(
        MambaConfig(hidden_size=options.width, state_size=options.state, expand=2, num_hidden_layers=1), layer_idx=0
    )
