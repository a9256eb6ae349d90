"""Many completions through few rows: a row whose completion has ended is given to the next one.

A prompt goes through the model once, whatever the number of its samples: each sample takes a copy of its row in the
cache. Rows that have ended go on in the batch, ignored, until some have gathered: the caches of all layers are then
laid out anew in one go, without them and with what the waiting samples bring. Where rows stay is no matter to them.

# B rows of the batch, N some of them, V vocabulary
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from mmada.generation.decoder import Decoder
from mmada.generation.sampling import Drawn
from mmada.nn.cache import MMaDACache

PREFILL_TOKENS = 16384  # of prompts that are fed together, padding included: bounds what one forward pass holds
PREFILL_PADDING = 64  # of these: beyond it another forward pass costs less

SPARE_COLUMNS = 64  # tokens that keys and values have room for before they are copied to a larger place


class Sample(Protocol):
    """One completion on its way, of the prompt with that number."""

    prompt: int

    def add(self, token: int, logprob: float, sampling_logprob: float) -> bool:
        """Take the next token; whether it is the last."""


S = TypeVar("S", bound=Sample)

# Made for some samples in a row; turns their next logits (B, V) into their next tokens, again and again.
Chooser = Callable[[Tensor], Drawn]


class Fed(NamedTuple):
    """Prompts that went through the model together: the cache after them, and the logits of what follows, (B, V)."""

    cache: MMaDACache
    logits_BV: Tensor


@dataclass(frozen=True)
class Waiting(Generic[S]):
    """A sample whose prompt has been fed, in that row."""

    sample: S
    fed: Fed
    row: int


class Batch(Generic[S]):
    """The rows, and who waits for one."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        samples: Sequence[Sequence[S]],
        chooser_for: Callable[[Sequence[S]], Chooser],
        slots: int,
    ) -> None:
        """``samples[i]``: those of prompt i. ``slots``: rows at most. Raises ValueError where there are none."""
        if slots < 1:
            raise ValueError(f"slots={slots} leaves no row to decode in; use 32, say")
        self._decoder, self._prompts, self._samples = decoder, prompts, samples
        self._chooser_for, self._slots = chooser_for, slots
        # Neighbours are fed together, and similar lengths need little padding.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        self._unfed = deque(index for index in order if samples[index])
        self._waiting: deque[Waiting[S]] = deque()

    @torch.inference_mode()
    def run(self) -> None:
        """Decode until every sample has ended."""
        rows: list[S] = []
        live: list[int] = []
        tokens_B, cache = torch.empty(0, dtype=torch.long, device=self._decoder.device), None
        while True:
            rows, tokens_B, cache = self._laid_out(rows, live, tokens_B, cache)
            if cache is None:
                return
            choose, has_ended = self._chooser_for(rows), [False] * len(rows)
            while not self._is_due(has_ended):
                logits_BV = self._decoder.step(tokens_B, cache)
                tokens_B = self._advance(rows, choose(logits_BV), has_ended)
            live = [row for row, ended in enumerate(has_ended) if not ended]

    def _is_due(self, has_ended: Sequence[bool]) -> bool:
        """Whether it is worth it to lay the rows out anew, without those that have ended."""
        num_ended, num_rows = sum(has_ended), len(has_ended)
        return num_ended == num_rows or num_ended >= max(1, num_rows // 8)

    def _laid_out(
        self, rows: list[S], live: list[int], tokens_B: Tensor, cache: MMaDACache | None
    ) -> tuple[list[S], Tensor, MMaDACache | None]:
        """The ``live`` ones of the rows, and waiting samples for the others; their last tokens, and their cache."""
        rows, tokens, sources = [rows[row] for row in live], [tokens_B[live]], []
        while len(rows) < self._slots and (self._unfed or self._waiting):
            for fed, group in groupby(self._next(self._slots - len(rows)), key=lambda waiting: waiting.fed):
                waiting = list(group)
                row_N = torch.tensor([each.row for each in waiting], device=self._decoder.device)
                samples = [each.sample for each in waiting]
                has_ended = [False] * len(samples)
                tokens_N = self._advance(samples, self._chooser_for(samples)(fed.logits_BV[row_N]), has_ended)
                staying = [place for place, ended in enumerate(has_ended) if not ended]
                rows += [samples[place] for place in staying]
                tokens.append(tokens_N[staying])
                sources.append((fed.cache, row_N[staying]))
        tokens_B = torch.cat(tokens)
        if not rows:
            return rows, tokens_B, None
        if cache is None or not live:
            return rows, tokens_B, MMaDACache.joined(sources, SPARE_COLUMNS)
        cache, order = cache.refilled(live, sources, SPARE_COLUMNS)
        return [rows[number] for number in order], tokens_B[order], cache

    def _next(self, count: int) -> list[Waiting[S]]:
        """Up to ``count`` samples that waited, at least one; prompts are fed as long as there are too few."""
        if len(self._waiting) < count and self._unfed:
            prompts: list[int] = []
            num_samples, padding = len(self._waiting), 0
            width = len(self._prompts[self._unfed[0]])
            while self._unfed and num_samples < count:
                padding += width - len(self._prompts[self._unfed[0]])
                if prompts and ((len(prompts) + 1) * width > PREFILL_TOKENS or padding > PREFILL_PADDING):
                    break
                prompts.append(self._unfed.popleft())
                num_samples += len(self._samples[prompts[-1]])
            fed = Fed(*self._decoder.prefill([self._prompts[prompt] for prompt in prompts]))
            for row, prompt in enumerate(prompts):
                self._waiting.extend(Waiting(sample, fed, row) for sample in self._samples[prompt])
        return [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]

    def _advance(self, rows: Sequence[S], drawn: Drawn, has_ended: list[bool]) -> Tensor:
        """Give every row that has not ended its token, and note which that ends. One wait for the device."""
        told = torch.stack([each.double() for each in drawn]).tolist()
        for row, (token, logprob, sampling_logprob) in enumerate(zip(*told, strict=True)):
            if has_ended[row]:
                continue
            if not math.isfinite(logprob):
                raise ValueError(
                    f"prompts[{rows[row].prompt}]: the model's logits are not finite, so that no token can be drawn; "
                    "look for NaN or infinity in its weights"
                )
            has_ended[row] = rows[row].add(int(token), logprob, sampling_logprob)
        return drawn.tokens_B
