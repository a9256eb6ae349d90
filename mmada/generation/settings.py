"""How to sample, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Finish = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled; the order is that of transformers: temperature, then top-k, then top-p.

    ``max_new_tokens``: at most so many per completion. ``temperature``: what logits are divided by; 0 takes the most
    likely token. ``top_k``: only so many most likely tokens; 0 for all. ``top_p``: only the most likely tokens that
    together have this probability. ``stop``: texts that end a completion, which then ends with the token that
    completes one; special tokens are not part of the text.
    Raises ValueError naming field, value and remedy.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} leaves nothing to sample; use 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} is not in [0, inf); use 1, or 0 for the likeliest token")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; use 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]; use 1 for all tokens")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ValueError(f"stop={self.stop!r} is no tuple of texts with something in them; use ('\\n',), say")


@dataclass
class Completion:
    """What was sampled for one prompt.

    ``ids``: the new tokens, an end token included where one was made. ``logprobs``: of each, the natural logarithm
    of its probability at the temperature, over the whole vocabulary (at temperature 0: of the model's as it is).
    ``sampling_logprobs``: in the distribution that it was drawn from, which top-k and top-p may have cut.
    ``finish``: whether an end token, a stop text or the length ended it.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    finish: Finish = "length"
