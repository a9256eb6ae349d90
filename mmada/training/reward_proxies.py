"""Cheap measures that stand for the components of a learned reward, each in [-1, 1].

correctness   the verifier of the task
coherence     perplexity under a small model of the bytes of right answers
creativity    distinct-n (Li et al. 2016, arXiv:1510.03055)
faithfulness  how much of the completion the question covers, after the extractive coverage of Grusky et al. 2018
              (arXiv:1804.11283), with characters in place of words: answers of these tasks are a word or a number
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

_SYMBOLS = 257  # bytes, and the end
_END = 256


class ByteBigrams:
    """A bigram model of bytes with add-one smoothing; ``typical_bits`` is what its own texts need per byte."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Raises ValueError where there is no text."""
        self._pairs: Counter[tuple[int, int]] = Counter()
        self._firsts: Counter[int] = Counter()
        known = [_symbols(text) for text in texts]
        if not known:
            raise ValueError("a model of bytes needs a text")
        for symbols in known:
            self._pairs.update(zip(symbols, symbols[1:], strict=False))
            self._firsts.update(symbols[:-1])
        self.typical_bits = sum(map(self._bits, known)) / sum(len(symbols) - 1 for symbols in known)

    def bits_per_symbol(self, text: str) -> float:
        """Mean bits that a byte of the text, or its end, needs."""
        symbols = _symbols(text)
        return self._bits(symbols) / (len(symbols) - 1)

    def coherence(self, text: str) -> float:
        """1 for what is as expected as right answers are, -1 for what is no better than bytes drawn by chance."""
        chance = math.log2(_SYMBOLS)
        strangeness = (self.bits_per_symbol(text) - self.typical_bits) / (chance - self.typical_bits)
        return 1 - 2 * min(1.0, max(0.0, strangeness))

    def _bits(self, symbols: list[int]) -> float:
        pairs = zip(symbols, symbols[1:], strict=False)
        return -sum(math.log2((self._pairs[pair] + 1) / (self._firsts[pair[0]] + _SYMBOLS)) for pair in pairs)


def _symbols(text: str) -> list[int]:
    return [_END, *text.encode("utf-8", "surrogateescape"), _END]


def creativity(text: str, n: int = 2) -> float:
    """Distinct-n over characters, brought to [-1, 1]; a text too short to repeat itself has 1."""
    grams = [text[start : start + n] for start in range(len(text) - n + 1)]
    return 1.0 if not grams else 2 * len(set(grams)) / len(grams) - 1


def faithfulness(prompt: str, completion: str) -> float:
    """Share of the completion's characters, each as often as it occurs, that the prompt has, brought to [-1, 1]."""
    said = Counter(completion)
    return 2 * (said & Counter(prompt)).total() / said.total() - 1 if said else -1.0


def correctness(score: float) -> float:
    """A verifier's score in [0, 1], brought to [-1, 1]."""
    return 2 * score - 1
