"""Where documents come from: the standard library, a folder of files, or a Hugging Face data set.

Every source is read as a stream of `Document`s in a fixed order; nothing here holds a corpus in memory.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmada.data.hub import hub_texts
from mmada.data.stdlib_text import stdlib_documents, stdlib_fingerprint
from mmada.errors import DataError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
_SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES
_PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class TextSource:
    """What text to read.

    Attributes:
        kind: the recipe's `data.source`: "stdlib" (the documentation that comes with Python), "files" or "hub".
        path: a file or folder for "files"; a data set's name, or a folder of one, for "hub".
        text_field: the field of a JSONL line, or column of a Parquet file or data set, that holds the text.
        split: the data set's split ("hub"); None takes "train", or the only one.
        config_name: the data set's configuration ("hub").
        limit_documents: read this many documents and no more.

    Raises:
        DataError: the fields do not go together.
    """

    kind: str = "stdlib"
    path: str | None = None
    text_field: str = "text"
    split: str | None = None
    config_name: str | None = None
    limit_documents: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("stdlib", "files", "hub"):
            raise DataError(f"data.source={self.kind} is unknown; use stdlib, files or hub")
        if self.kind == "stdlib" and self.path is not None:
            raise DataError(
                f"data.path={self.path} has no meaning with data.source=stdlib; "
                "remove it, or use data.source=files or hub"
            )
        if self.kind != "stdlib" and not self.path:
            raise DataError(
                f"data.path is missing with data.source={self.kind}; give "
                + ("a file or a folder" if self.kind == "files" else "a data set's name")
            )
        if not self.text_field:
            raise DataError("data.text_field is empty; name the field that holds the text")
        for name in ("split", "config_name"):
            value = getattr(self, name)
            if value is not None and self.kind != "hub":
                raise DataError(f"data.{name}={value} has a meaning with data.source=hub only; remove it")
        if self.limit_documents is not None and self.limit_documents < 1:
            raise DataError(
                f"data.limit_documents={self.limit_documents} leaves nothing to read; use 1 or more, or leave it out"
            )


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: where it was read, for messages.
        pieces: the text in reading order, more than one where it is too long to hold at once; can be read repeatedly.
        group: what decides between training and held out; None: the text itself, so that copies stay together.
    """

    name: str
    pieces: Iterable[str]
    group: str | None = None


def read_documents(source: TextSource) -> Iterator[Document]:
    """The documents of `source`, in the same order each time. A blank text may come; a missing one is an error.

    Raises:
        DataError: missing, unreadable or wrongly shaped data, named by file and line where there are such.
    """
    readers = {"stdlib": _read_stdlib, "files": _read_files, "hub": _read_hub}
    return islice(readers[source.kind](source), source.limit_documents)


def describe(source: TextSource) -> dict[str, Any]:
    """What identifies the text without reading all of it: plain values, equal as long as nothing changed.

    Files count by path, size and modification time. A data set on the hub counts by its name alone, so that a run
    continues on the text it began with; clear the cache folder to read a newer version.
    """
    description: dict[str, Any] = asdict(source)
    if source.kind == "stdlib":
        description["stdlib"] = stdlib_fingerprint()
        return description
    root = Path(str(source.path)).expanduser().resolve()
    files = _text_files(str(source.path)) if source.kind == "files" else _walk(root)
    if files:
        description["path"] = str(root)
        description["files"] = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return description


def _read_stdlib(source: TextSource) -> Iterator[Document]:
    for name, text in stdlib_documents():
        yield Document(name, (text,), group=name)


def _read_hub(source: TextSource) -> Iterator[Document]:
    texts = hub_texts(str(source.path), source.config_name, source.split, source.text_field)
    for row, text in enumerate(texts):
        yield Document(f"{source.path}, row {row}", (_checked_text(text, source, f"row {row} of {source.path}"),))


def _read_files(source: TextSource) -> Iterator[Document]:
    for file in _text_files(str(source.path)):
        suffix = file.suffix.lower()
        try:
            if suffix in PARQUET_SUFFIXES:
                yield from _read_parquet(file, source)
            elif suffix in JSONL_SUFFIXES:
                yield from _read_jsonl(file, source)
            else:
                yield Document(str(file), _TextFile(file))
        except OSError as error:
            raise _unreadable(file, error) from error


def _text_files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"data.path={path}: no such file or folder; give one that exists")
    files = [file for file in _walk(root) if file.suffix.lower() in _SUFFIXES]
    if not files:
        what = "the folder holds no file" if root.is_dir() else "the file's name is not one"
        raise DataError(
            f"data.path={path}: {what} ending in {', '.join(_SUFFIXES)}; rename the text, or give another path"
        )
    return files


def _walk(root: Path) -> list[Path]:
    """All files under `root` (or `root` itself), sorted; hidden ones, and what hidden folders hold, left out."""
    if not root.is_dir():
        return [root] if root.is_file() else []
    files = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def _raise(error: OSError) -> None:
    raise _unreadable(Path(error.filename), error) from error


@dataclass(frozen=True)
class _TextFile:
    """The text of a file, in pieces of about a million characters that end with a line; its line ends untouched."""

    file: Path

    def __iter__(self) -> Iterator[str]:
        try:
            with self.file.open(encoding="utf-8", newline="\n") as stream:
                while piece := stream.read(_PIECE_CHARACTERS):
                    yield piece + stream.readline(_PIECE_CHARACTERS)
        except UnicodeDecodeError as error:
            raise DataError(
                f"data.path={self.file}: not UTF-8 ({error.reason}, byte "
                f"0x{error.object[error.start]:02x}); convert it, say with iconv -t utf-8"
            ) from error
        except OSError as error:
            raise _unreadable(self.file, error) from error


def _read_jsonl(file: Path, source: TextSource) -> Iterator[Document]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"data.path={where}: not JSON ({error}); put one JSON object on each line") from error
            if not isinstance(row, dict):
                raise DataError(f"data.path={where}: a JSON {type(row).__name__}; put one JSON object on each line")
            if source.text_field not in row:
                raise _no_such_field(source, where, list(row))
            yield Document(where, (_checked_text(row[source.text_field], source, where),))


def _read_parquet(file: Path, source: TextSource) -> Iterator[Document]:
    try:
        parquet = pq.ParquetFile(file, memory_map=True)
        schema = parquet.schema_arrow
        if source.text_field not in schema.names:
            raise _no_such_field(source, str(file), schema.names)
        row = 0
        for batch in parquet.iter_batches(batch_size=256, columns=[source.text_field]):
            for text in batch.column(0).to_pylist():
                where = f"{file}, row {row}"
                yield Document(where, (_checked_text(text, source, where),))
                row += 1
    except pa.ArrowException as error:
        raise _unreadable(file, error) from error


def _checked_text(text: object, source: TextSource, where: str) -> str:
    """The text of a row; a null is as good as a blank one, anything else that is no text is refused."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"data.text_field={source.text_field}: {where} holds {type(text).__name__}, not text; name a field of text"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"data.text_field={source.text_field}: {where} holds half of a surrogate pair "
            f"({error.object[error.start]!r}); remove it or write the whole character"
        ) from error
    return text


def _no_such_field(source: TextSource, where: str, names: list[str]) -> DataError:
    return DataError(f"data.text_field={source.text_field}: no such field in {where}; use one of {', '.join(names)}")


def _unreadable(file: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(f"data.path={file}: cannot be read ({reason}); repair it, or give another path")
