"""Token streams on disk: Arrow shards written piece by piece, read back as memory maps.

A shard is an Arrow IPC stream (`datasets.Dataset.from_file` opens it too) of rows {tokens, starts_document}: one row
per document, or several where a document is too long to hold at once. The stream is the rows' tokens, end to end.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mmada.data.packing import PackedRows
from mmada.errors import DataError

SHARD_TOKENS = 1 << 26
_BATCH_TOKENS = 1 << 20  # what is held in memory before it goes to disk


class ShardWriter:
    """Writes the shards of one split; close() completes the last one."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        tokens = pa.large_list(pa.from_numpy_dtype(dtype))
        self._schema = pa.schema([("tokens", tokens), ("starts_document", pa.bool_())])
        self._rows: list[np.ndarray] = []
        self._starts: list[bool] = []
        self._num_pending = self._num_in_shard = 0
        self._stream: pa.NativeFile | None = None
        self._writer: pa.RecordBatchWriter | None = None
        self.shards: list[dict[str, Any]] = []

    def append(self, tokens: np.ndarray, starts_document: bool) -> None:
        """Adds a document's tokens, or more tokens of the document before."""
        self._rows.append(tokens.astype(self._dtype, copy=False))
        self._starts.append(starts_document)
        self._num_pending += len(tokens)
        if self._num_pending >= min(_BATCH_TOKENS, self._shard_tokens):
            self._write_batch()

    def close(self) -> None:
        """Writes what is pending."""
        if self._rows:
            self._write_batch()
        self._end_shard()

    def _write_batch(self) -> None:
        if self._writer is None:
            file = self._folder / f"{self._split}-{len(self.shards):05d}.arrow"
            self._stream = pa.OSFile(str(file), "wb")
            self._writer = pa.ipc.new_stream(self._stream, self._schema)
            self.shards.append({"file": file.name})
        offsets = np.cumsum([0, *map(len, self._rows)], dtype=np.int64)
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(self._rows)))
        self._writer.write_batch(pa.record_batch([lists, pa.array(self._starts)], schema=self._schema))
        self._num_in_shard += self._num_pending
        self._rows, self._starts, self._num_pending = [], [], 0
        if self._num_in_shard >= self._shard_tokens:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._writer is None or self._stream is None:
            return
        self._writer.close()
        self._stream.close()
        self.shards[-1] |= {
            "num_tokens": self._num_in_shard,
            "file_bytes": (self._folder / self.shards[-1]["file"]).stat().st_size,
        }
        self._writer = self._stream = None
        self._num_in_shard = 0


class _Chunk(NamedTuple):
    """One record batch: views into the memory map."""

    tokens: np.ndarray
    row_offsets: np.ndarray  # of each row's first token in `tokens`
    starts_document: pa.BooleanArray


@dataclass(frozen=True, eq=False)
class TokenStream:
    """All tokens of a split, document after document, memory-mapped.

    Attributes:
        num_tokens: with the documents' begin and end tokens.
        num_bytes: of the texts, as UTF-8: the denominator of bits per byte.
        num_documents: how many documents.
        pad_token_id: what fills the last row.
    """

    num_tokens: int
    num_bytes: int
    num_documents: int
    pad_token_id: int
    _chunks: list[_Chunk] = field(repr=False)
    _chunk_begins: np.ndarray = field(repr=False)

    @classmethod
    def open(cls, folder: Path, meta: dict[str, Any], pad_token_id: int) -> "TokenStream":
        """Maps the shards that `meta` (a split's entry in meta.json) lists.

        Raises:
            DataError: a shard is missing or is not as it was written.
        """
        chunks = [chunk for shard in meta["shards"] for chunk in _open_shard(folder, shard)]
        begins = np.array([0, *accumulate(len(chunk.tokens) for chunk in chunks)], dtype=np.int64)
        if begins[-1] != meta["num_tokens"]:
            raise _damaged(folder, f"{begins[-1]} tokens instead of {meta['num_tokens']}")
        return cls(meta["num_tokens"], meta["num_bytes"], meta["num_documents"], pad_token_id, chunks, begins)

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [begin, end) and the positions in [begin, end) at which a document starts.

        The tokens are a view of the memory map, and nothing is copied, unless they lie in more than one record batch.
        """
        first = int(np.searchsorted(self._chunk_begins, begin, side="right")) - 1
        tokens, starts = [], []
        for index in range(first, len(self._chunks)):
            chunk, offset = self._chunks[index], int(self._chunk_begins[index])
            if offset >= end:
                break
            low, high = max(begin - offset, 0), min(end - offset, len(chunk.tokens))
            tokens.append(chunk.tokens[low:high])
            rows = slice(*np.searchsorted(chunk.row_offsets, [low, high]))
            is_start = chunk.starts_document[rows].to_numpy(zero_copy_only=False)
            starts.append(chunk.row_offsets[rows][is_start] + offset)
        if len(tokens) == 1:
            return tokens[0], starts[0]
        return np.concatenate(tokens), np.concatenate(starts)

    def rows(self, sequence_length: int) -> PackedRows:
        """The stream cut into training rows of `sequence_length` tokens."""
        return PackedRows(self, sequence_length)


def _open_shard(folder: Path, shard: dict[str, Any]) -> list[_Chunk]:
    file = folder / shard["file"]
    if not file.is_file():
        raise _damaged(folder, f"{file.name} is missing")
    if file.stat().st_size != shard["file_bytes"]:
        raise _damaged(folder, f"{file.name} has {file.stat().st_size} bytes instead of {shard['file_bytes']}")
    try:
        batches = list(pa.ipc.open_stream(pa.memory_map(str(file))))
    except (OSError, pa.ArrowException) as error:
        raise _damaged(folder, f"{file.name}: {error}") from error
    return [
        _Chunk(
            tokens=batch["tokens"].values.to_numpy(zero_copy_only=True),
            row_offsets=batch["tokens"].offsets.to_numpy(zero_copy_only=True)[:-1],
            starts_document=batch["starts_document"],
        )
        for batch in batches
    ]


def _damaged(folder: Path, reason: str) -> DataError:
    return DataError(
        f"data.cache_dir: the prepared data in {folder} is damaged ({reason}); "
        "remove that folder and it will be prepared again"
    )
