"""Which documents are held out: chosen by a hash, so that the choice needs no list and copies stay together."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mmada.data.sources import Document
from mmada.errors import DataError

_NUM_BINS = 1 << 20  # documents whose hashes begin with the same 20 bits go together: 8 MiB, however many there are
BLANK = -1


@dataclass(frozen=True)
class Survey:
    """What one reading of a source found.

    Attributes:
        content_sha256: hash over the texts, in order.
        num_documents, num_bytes: of the documents that are not blank; bytes of UTF-8.
        bytes_per_bin: how many of those bytes fall to each value of the hash's first 20 bits.
    """

    content_sha256: str
    num_documents: int
    num_bytes: int
    bytes_per_bin: np.ndarray


class Surveyor:
    """Reads documents as they pass and adds up a `Survey`."""

    def __init__(self) -> None:
        self._content = hashlib.sha256()
        self._num_documents = 0
        self._bytes_per_bin = np.zeros(_NUM_BINS, dtype=np.int64)

    def add(self, document: Document) -> int:
        """Counts a document; returns its bin, or BLANK for a text of white space, which does not count."""
        digest, num_bytes, blank = hashlib.sha256(), 0, True
        for piece in document.pieces:
            data = piece.encode("utf-8")
            digest.update(data)
            num_bytes += len(data)
            blank = blank and not piece.strip()
        if blank:
            return BLANK
        self._content.update(digest.digest())
        self._num_documents += 1
        group = digest if document.group is None else hashlib.sha256(document.group.encode("utf-8"))
        index = int.from_bytes(group.digest()[:4], "big") >> 12
        self._bytes_per_bin[index] += num_bytes
        return index

    def survey(self) -> Survey:
        """What was added so far."""
        num_bytes = int(self._bytes_per_bin.sum())
        return Survey(self._content.hexdigest(), self._num_documents, num_bytes, self._bytes_per_bin.copy())


@dataclass(frozen=True)
class HeldOutChoice:
    """Either whole bins of documents are held out, or, where there is but one, the tail of the text.

    Attributes:
        is_held_out: per bin; all False where the tail is held out.
        tail_begins_at: byte at which each document's tail begins; None where whole documents are held out.
    """

    is_held_out: np.ndarray
    tail_begins_at: int | None = None

    @property
    def manner(self) -> str:
        """In words, for the record."""
        if self.tail_begins_at is None:
            return "whole documents"
        return f"the tail from byte {self.tail_begins_at} on, since all the text is one document"

    def sides(self, document: Document, index: int) -> Iterator[tuple[str, Iterable[str]]]:
        """The split that a document of bin `index` belongs to, with its pieces; both where its tail is cut off."""
        if self.tail_begins_at is None:
            yield ("held_out" if self.is_held_out[index] else "train"), document.pieces
        else:
            yield "train", _part(document.pieces, 0, self.tail_begins_at)
            yield "held_out", _part(document.pieces, self.tail_begins_at, sys.maxsize)


def choose_held_out(survey: Survey, share: float) -> HeldOutChoice:
    """Takes bins in the order of the hash until `share` of the bytes is held out, passing over those that overshoot.

    At least one bin is held out (the smallest, if all overshoot) and at least one is left. A single document, alone or
    in copies, is cut instead: its last `share` is held out.
    """
    occupied = np.flatnonzero(survey.bytes_per_bin)
    is_held_out = np.zeros(_NUM_BINS, dtype=bool)
    if len(occupied) < 2:
        num_bytes = survey.num_bytes // survey.num_documents
        return HeldOutChoice(is_held_out, tail_begins_at=min(max(round(num_bytes * (1 - share)), 1), num_bytes - 1))
    wanted, held = share * survey.num_bytes, 0
    for index in occupied:
        num_bytes = int(survey.bytes_per_bin[index])
        if held + num_bytes <= wanted:
            is_held_out[index] = True
            held += num_bytes
        if held >= 0.99 * wanted:
            break
    if held == 0:
        is_held_out[occupied[np.argmin(survey.bytes_per_bin[occupied])]] = True
    return HeldOutChoice(is_held_out)


def check_share(held_out: float) -> None:
    """Raises DataError unless 0 < held_out < 1."""
    if not 0.0 < held_out < 1.0:
        raise DataError(f"data.held_out={held_out} is not a share of the text; use a number between 0 and 1, say 0.05")


def _part(pieces: Iterable[str], begin: int, end: int) -> Iterator[str]:
    """The characters whose first byte is in [begin, end) of the text's UTF-8."""
    offset = 0
    for piece in pieces:
        data = piece.encode("utf-8")
        yield data[_next_character(data, begin - offset) : _next_character(data, end - offset)].decode("utf-8")
        offset += len(data)


def _next_character(data: bytes, index: int) -> int:
    index = min(max(index, 0), len(data))
    while index < len(data) and data[index] & 0xC0 == 0x80:
        index += 1
    return index
