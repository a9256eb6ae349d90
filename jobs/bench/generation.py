"""Completion tokens per second: ``generate_batch`` beside transformers' ``generate``, on the same weights and prompts.

transformers decodes all prompts as one batch padded on the left, or in groups as large as our batch, until the last row
of a batch has ended; ours gives a row whose completion has ended to the next prompt. transformers' runs twice: with
our model and with its own Qwen3 of the same weights. Counted alike: every token up to the one that ends a completion.
Ours also tells each token's log-probabilities, which transformers is not asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from jobs.bench.measuring import in_turns, quartiles, with_share, with_spread
from jobs.bench.qwen_twin import twins
from mmada.generate import SamplingSettings, generate_batch
from mmada.tokenizer import BYTE_OFFSET, PAD_ID

if TYPE_CHECKING:
    from rich.table import Table

OURS, AT_ONCE, IN_GROUPS, QWEN = (
    "generate_batch (mmada)",
    "generate, our model, at once",
    "generate, our model, in groups",
    "generate, Qwen3, at once",
)
Runs = dict[str, list[tuple[int, float]]]  # tokens and seconds of every round


def contenders(options: Any) -> dict[str, Callable[[], tuple[int, float]]]:
    """Each makes all completions once, and gives the number of their tokens and the seconds it took."""
    end_ids = list(range(BYTE_OFFSET, BYTE_OFFSET + options.end_ids))
    ours, qwen = twins(options.width, options.layers, options.lengths[1] + options.new_tokens, end_ids)
    prompts = random_prompts(options.prompts, *options.lengths)
    settings, rounds = SamplingSettings(options.new_tokens), count()

    def sample() -> int:
        first = next(rounds) * len(prompts)
        seeds = [[first + index] for index in range(len(prompts))]
        made = generate_batch(ours, prompts, settings, seeds=seeds, slots=options.slots)
        return sum(len(completion.ids) for own in made for completion in own)

    def generate(model: Any, rows: int) -> Callable[[], int]:
        return lambda: sum(
            count_generated(model, prompts[begin : begin + rows], options.new_tokens, end_ids)
            for begin in range(0, len(prompts), rows)
        )

    work = {
        OURS: sample,
        AT_ONCE: generate(ours, len(prompts)),
        IN_GROUPS: generate(ours, options.slots),
        QWEN: generate(qwen, len(prompts)),
    }
    return {name: timed(each) for name, each in work.items()}


def timed(work: Callable[[], int]) -> Callable[[], tuple[int, float]]:
    """The same with the seconds it takes."""

    def run() -> tuple[int, float]:
        started = time.perf_counter()
        return work(), time.perf_counter() - started

    return run


def random_prompts(number: int, shortest: int, longest: int) -> list[list[int]]:
    """Bytes; lengths even between the shortest and the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (number,), generator=generator).tolist()
    return [torch.randint(BYTE_OFFSET, 264, (length,), generator=generator).tolist() for length in lengths]


def count_generated(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, end_ids: Sequence[int]) -> int:
    """Sample a completion of each prompt as one batch with transformers; the tokens up to each one's end."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[*[PAD_ID] * (longest - len(prompt)), *prompt] for prompt in prompts])
    missing_B1 = torch.tensor([[longest - len(prompt)] for prompt in prompts])
    made_BT = model.generate(
        ids_BT,
        attention_mask=(torch.arange(longest) >= missing_B1).long(),
        do_sample=True,
        top_k=0,
        max_new_tokens=new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=PAD_ID,
    )[:, longest:]
    ended_BT = torch.isin(made_BT, torch.tensor(end_ids)).long()
    return int((ended_BT.cumsum(dim=1) - ended_BT == 0).sum())


def measure(runners: dict[str, Callable[[], tuple[int, float]]], options: Any) -> Runs:
    """All of them in turns."""
    return in_turns(runners, options.rounds, warm_ups=1)


def speeds(taken: Runs) -> dict[str, list[float]]:
    """Tokens per second of every round."""
    return {name: [tokens / seconds for tokens, seconds in runs] for name, runs in taken.items()}


def ratios(taken: Runs, peer: str) -> list[float]:
    """How many times as fast as the peer ours was, round by round."""
    rates = speeds(taken)
    return [ours / theirs for ours, theirs in zip(rates[OURS], rates[peer], strict=True)]


def table(options: Any, taken: Runs) -> Table:
    """What is printed."""
    from jobs.plan_report import table_of

    result = table_of("sampling", "tokens", "tokens/s", "ours is times as fast")
    for name, rates in speeds(taken).items():
        tokens = quartiles([tokens for tokens, _ in taken[name]])[1]
        versus = "" if name == OURS else with_spread(quartiles(ratios(taken, name)))
        result.add_row(name, f"{tokens:,.0f}", with_share(rates), versus)
    return result


def caption(options: Any, threads: int) -> str:
    """How it was measured."""
    shortest, longest = options.lengths
    return (
        f"width {options.width}, {options.layers} layers, {options.prompts} prompts of {shortest} to {longest} tokens, "
        f"up to {options.new_tokens} new ones, about one in {264 // options.end_ids} ends a completion; groups and "
        f"slots of {options.slots} rows; float32, {threads} threads, {options.rounds} rounds in turns; medians"
    )


def record(options: Any, taken: Runs) -> dict[str, Any]:
    """The same for a program, with every single run."""
    names = ("width", "layers", "prompts", "lengths", "new_tokens", "end_ids", "slots")
    return {
        "sizes": {name: getattr(options, name) for name in names},
        "runs": {name: [{"tokens": n, "seconds": s} for n, s in runs] for name, runs in taken.items()},
    }
