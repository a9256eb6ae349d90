"""Texts that end a completion, found as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from mmada.tokenizer import BYTE_OFFSET, IMAGE_CODE_OFFSET, ByteTokenizer, IncrementalDecoder


class StopWatch(Protocol):
    """Is told every token of one completion."""

    def push(self, token: int) -> bool:
        """Whether this token completes one of the texts."""


class ByteWatch:
    """Compares bytes: a token is a byte at most, so a text can only end at the newest."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text.encode() for text in stop)
        self._longest = max(map(len, self._stop))
        self._tail = b""

    def push(self, token: int) -> bool:
        if BYTE_OFFSET <= token < IMAGE_CODE_OFFSET:
            self._tail = (self._tail + bytes((token - BYTE_OFFSET,)))[-self._longest :]
            return self._tail.endswith(self._stop)
        return False


class TextWatch:
    """Decodes as it goes, with any tokenizer."""

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._stop, self._longest = tuple(stop), max(map(len, stop))
        self._decoder, self._tail = IncrementalDecoder(tokenizer), ""

    def push(self, token: int) -> bool:
        text = self._tail + self._decoder.push([token])
        self._tail = text[max(0, len(text) - self._longest + 1) :]
        return any(stop in text for stop in self._stop)


def watch(stop: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> StopWatch | None:
    """A watch over one completion; None where no text ends it. Raises ValueError without the tokenizer it needs."""
    if not stop:
        return None
    if tokenizer is None:
        raise ValueError(f"stop={tuple(stop)} is looked for in decoded text; give the tokenizer, too")
    return ByteWatch(stop) if isinstance(tokenizer, ByteTokenizer) else TextWatch(stop, tokenizer)
