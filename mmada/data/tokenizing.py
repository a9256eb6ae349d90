"""Documents to tokens, many at a time, for whatever tokenizer is used."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmada.data.shards import ShardWriter
from mmada.tokenizer import ByteTokenizer

_FLUSH_CHARACTERS = 4 << 20
_FLUSH_PIECES = 2048


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What makes two tokenizers give the same tokens: class, size, special ids, and a hash of the rules."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("padding", None)  # set by whoever last padded or truncated with it
        rules.pop("truncation", None)
    else:
        rules = tokenizer.get_vocab()
    return {
        "class": type(tokenizer).__name__,
        "vocab_size": len(tokenizer),
        "begin_token_id": tokenizer.bos_token_id,
        "end_token_id": tokenizer.eos_token_id,
        "sha256": hashlib.sha256(json.dumps(rules, sort_keys=True).encode("utf-8")).hexdigest(),
    }


class SplitOutput:
    """Takes the documents of one split; writes their tokens as shards, and their text too where a file is given.

    A document becomes [begin token] tokens [end token], as far as the tokenizer has such. Special tokens that are
    spelled out in a text are not taken for special tokens.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        shard_tokens: int,
        text_file: BinaryIO | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.min_scalar_type(len(tokenizer) - 1)
        self._writer = ShardWriter(folder, split, self._dtype, shard_tokens)
        self._text_file = text_file
        self._content = hashlib.sha256()
        self._pending: list[tuple[str, bool, bool]] = []
        self._num_pending_characters = 0
        self._document_has_tokens = False
        self.num_documents = self.num_bytes = self.num_tokens = 0

    def add(self, pieces: Iterable[str]) -> None:
        """Adds a document, given as the pieces of its text."""
        for piece, is_first, is_last in _with_ends(pieces):
            self._pending.append((piece, is_first, is_last))
            self._num_pending_characters += len(piece)
            data = piece.encode("utf-8")
            self.num_bytes += len(data)
            self._content.update(hashlib.sha256(bytes([is_first]) + data).digest())
            if self._text_file:
                self._text_file.write(data)
            if self._num_pending_characters >= _FLUSH_CHARACTERS or len(self._pending) >= _FLUSH_PIECES:
                self._flush()

    def close(self) -> dict[str, Any]:
        """Writes what is pending; returns the split's entry for meta.json."""
        self._flush()
        self._writer.close()
        return {
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "num_tokens": self.num_tokens,
            "content_sha256": self._content.hexdigest(),
            "dtype": str(self._dtype),
            "shards": self._writer.shards,
        }

    def _flush(self) -> None:
        begin, end = (
            np.array([] if i is None else [i], dtype=self._dtype)
            for i in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        )
        token_rows = _encode([text for text, _, _ in self._pending], self._tokenizer)
        for (_, is_first, is_last), tokens in zip(self._pending, token_rows, strict=True):
            parts = [begin] * is_first + [tokens.astype(self._dtype)] + [end] * is_last
            tokens = np.concatenate(parts)
            self._document_has_tokens = self._document_has_tokens and not is_first
            if len(tokens):
                self._writer.append(tokens, starts_document=not self._document_has_tokens)
                self.num_documents += not self._document_has_tokens
                self.num_tokens += len(tokens)
                self._document_has_tokens = True
        self._pending, self._num_pending_characters = [], 0


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    if isinstance(tokenizer, ByteTokenizer):
        return [tokenizer.encode_bytes(text.encode("utf-8")) for text in texts]
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]


def _with_ends(pieces: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """The pieces that are not empty, each with: is it the first, is it the last."""
    held, is_first = "", True
    for piece in filter(None, pieces):
        if held:
            yield held, is_first, False
            is_first = False
        held = piece
    if held:
        yield held, is_first, True
