"""Completions of many prompts by sampling, and the log-probabilities of given ones.

# B rows, T tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmada.generation.batch import Batch, Chooser
from mmada.generation.decoder import Decoder
from mmada.generation.sampling import Drawn, as_int64, draw, pick, tempered
from mmada.generation.settings import Completion, SamplingSettings
from mmada.generation.stopping import StopWatch, watch


@dataclass
class Draft:
    """A completion that is being sampled."""

    prompt: int
    seed: int
    settings: SamplingSettings
    end_ids: frozenset[int]
    watch: StopWatch | None
    completion: Completion = field(default_factory=Completion)

    def add(self, token: int, logprob: float, sampling_logprob: float) -> bool:
        completion = self.completion
        completion.ids.append(token)
        completion.logprobs.append(logprob)
        completion.sampling_logprobs.append(sampling_logprob)
        if token in self.end_ids:
            completion.finish = "end"
        elif self.watch is not None and self.watch.push(token):
            completion.finish = "stop"
        else:
            return len(completion.ids) == self.settings.max_new_tokens
        return True


@dataclass
class Recital:
    """A completion that is known, and the log-probabilities of its tokens so far."""

    prompt: int
    ids: Sequence[int]
    logprobs: list[float] = field(default_factory=list)

    def add(self, token: int, logprob: float, sampling_logprob: float) -> bool:
        self.logprobs.append(logprob)
        return len(self.logprobs) == len(self.ids)


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    seeds: Sequence[Sequence[int]] | None,
    slots: int = 32,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[Completion]]:
    """Sample completions of ``prompts`` (ids), as many of each as it has seeds, ``slots`` rows at a time.

    The noise of a completion's token t is a function of (seed, t) alone: a completion does not depend, but for the
    rounding of logits, on which others share its batch. ``seeds`` None: one completion each, with seeds from torch's
    generator. ``tokenizer`` is needed for ``settings.stop``. ``config.eos_token_id`` ends a completion.

    Raises:
        ValueError: a prompt is empty, holds an unknown id or leaves no room for the new tokens within
            ``max_position_embeddings``; ``seeds`` and prompts differ in number; the model is in training mode.
    """
    decoder = Decoder(model)
    check_prompts(decoder.config, prompts, [settings.max_new_tokens] * len(prompts))
    seeds = seeds_for(prompts, seeds)
    ends = end_ids(decoder.config)
    drafts = [
        [Draft(prompt, seed, settings, ends, watch(settings.stop, tokenizer)) for seed in own]
        for prompt, own in enumerate(seeds)
    ]

    def chooser_for(samples: Sequence[Draft]) -> Chooser:
        seeds_B = as_int64((sample.seed for sample in samples), decoder.device)
        index_B = as_int64((len(sample.completion.ids) for sample in samples), decoder.device)

        def choose(logits_BV: Tensor) -> Drawn:
            drawn = draw(logits_BV, seeds_B, index_B, settings)
            index_B.add_(1)
            return drawn

        return choose

    Batch(decoder, prompts, drafts, chooser_for, slots).run()
    return [[draft.completion for draft in own] for own in drafts]


def score_cached(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float = 1.0,
    slots: int = 32,
) -> list[list[float]]:
    """Log-probability of every token of ``completions[i]`` (ids) behind ``prompts[i]``, at the temperature.

    The tokens go the way that ``generate_batch`` goes, one by one through the cache: what it says of them here is
    what it would have drawn them with. Raises ValueError as it does.
    """
    decoder = Decoder(model)
    if len(completions) != len(prompts):
        raise ValueError(f"there are {len(completions)} completions for {len(prompts)} prompts; give one for each")
    check_prompts(decoder.config, prompts, [len(ids) for ids in completions])
    check_ids(decoder.config, "completions", completions)
    recitals = [Recital(prompt, ids) for prompt, ids in enumerate(completions)]

    def chooser_for(samples: Sequence[Recital]) -> Chooser:
        rest = [sample.ids[len(sample.logprobs) :] for sample in samples]
        longest = max(map(len, rest))
        columns = iter(
            torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in rest], device=decoder.device).unbind(dim=1)
        )

        def choose(logits_BV: Tensor) -> Drawn:
            tokens_B = next(columns)
            logprobs_B = pick(tempered(logits_BV, temperature).log_softmax(dim=-1), tokens_B)
            return Drawn(tokens_B, logprobs_B, logprobs_B)

        return choose

    Batch(decoder, prompts, [[recital] if recital.ids else [] for recital in recitals], chooser_for, slots).run()
    return [recital.logprobs for recital in recitals]


def end_ids(config: Any) -> frozenset[int]:
    """The tokens that end a completion; none where the config names none."""
    ends = config.eos_token_id
    return frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends)


def seeds_for(prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]] | None) -> Sequence[Sequence[int]]:
    """The seeds as given, or one for each prompt from torch's generator. Raises ValueError for a wrong number."""
    if seeds is None:
        return [[seed] for seed in torch.randint(2**62, (len(prompts),)).tolist()]
    if len(seeds) != len(prompts):
        raise ValueError(f"there are seeds for {len(seeds)} prompts and {len(prompts)} prompts; give some for each")
    return seeds


def check_prompts(config: Any, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> None:
    """Raise ValueError for a prompt that is empty, too long or not of the vocabulary."""
    check_ids(config, "prompts", prompts)
    room = config.max_position_embeddings
    for index, (prompt, new) in enumerate(zip(prompts, new_tokens, strict=True)):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{index}] is empty; give at least one token, such as the begin-of-text id")
        if new >= room:
            raise ValueError(
                f"{new} new tokens leave a prompt no room in max_position_embeddings={room}; use at most {room - 1}"
            )
        if len(prompt) + new > room:
            raise ValueError(
                f"prompts[{index}] has {len(prompt)} tokens and {new} shall follow, but max_position_embeddings={room}"
                f"; use at most {room - new} tokens"
            )


def check_ids(config: Any, name: str, rows: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for an id outside the vocabulary."""
    size = config.vocab_size
    for index, ids in enumerate(rows):
        if len(ids) and not (min(ids) >= 0 and max(ids) < size):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(f"{name}[{index}] holds the id {wrong}, but vocab_size={size}; use ids from 0 to below it")
