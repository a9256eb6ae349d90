"""From a text source to token shards, once: read, split, tokenise, write aside, make current.

    cache_dir/<key>/   meta.json, train-00000.arrow ..., held_out-00000.arrow ..., held_out.txt

The key is a hash of what was asked for (source, tokenizer, share held out) and needs no reading of the text, so data
that is there is found at once. What was read is in meta.json.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mmada.data.shards import SHARD_TOKENS, TokenStream
from mmada.data.sources import TextSource, describe, read_documents
from mmada.data.splitting import BLANK, HeldOutChoice, Survey, Surveyor, check_share, choose_held_out
from mmada.data.tokenizing import SplitOutput, tokenizer_identity
from mmada.errors import DataError

FORMAT = 1
HELD_OUT_TEXT = "held_out.txt"


@dataclass(frozen=True)
class PreparedText:
    """Tokenised text on disk.

    Attributes:
        folder: where it is; `open_prepared(folder)` opens it again, in any process.
        fingerprint: hash of the texts, the tokenizer and the split: equal fingerprints, equal token streams.
        train, held_out: the two sides.
        held_out_text_path: the held-out texts as one UTF-8 file of `held_out.num_bytes` bytes.
        metadata: meta.json.
    """

    folder: Path
    fingerprint: str
    train: TokenStream
    held_out: TokenStream
    held_out_text_path: Path
    metadata: dict[str, Any] = field(repr=False)


def prepare(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    held_out: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
) -> PreparedText:
    """Tokenises `source` into shards under `cache_dir`, or opens them if they are there already.

    The text is read twice, first to look (and to find every fault before anything is written), then to tokenise. Memory
    stays bounded. Shards are written aside and appear under their final name complete: a killed preparation leaves
    nothing that looks done, and of two at a time one result stays.

    Args:
        held_out: share of the text's bytes kept from training, in whole documents.
        shard_tokens: a shard is closed when it has as many.

    Raises:
        DataError: the text or the cache folder cannot be used.
    """
    check_share(held_out)
    request = {
        "format": FORMAT,
        "source": describe(source),
        "tokenizer": tokenizer_identity(tokenizer),
        "held_out": held_out,
    }
    cache_dir = Path(cache_dir).expanduser()
    folder = cache_dir / _sha256(request)[:24]
    if (folder / "meta.json").is_file():
        return open_prepared(folder)
    survey = _survey(source)
    choice = choose_held_out(survey, held_out)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache_dir)
        with _partial_folder(folder) as partial:
            splits = _write(partial, source, survey, choice, tokenizer, shard_tokens)
            meta = _metadata(request, survey, choice, splits, tokenizer)
            (partial / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            _make_current(partial, folder)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise DataError(
            f"data.cache_dir={cache_dir}: cannot be written ({reason}); "
            "free space there, or give a folder that can be written"
        ) from error
    return open_prepared(folder)


def open_prepared(folder: Path) -> PreparedText:
    """Opens what `prepare` wrote; takes milliseconds, reads no text.

    Raises:
        DataError: nothing prepared is there, or it is damaged.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.cache_dir: {folder} holds no prepared data ({error}); "
            "prepare it again, or give the folder that holds it"
        ) from error
    if meta.get("format") != FORMAT:
        raise DataError(
            f"data.cache_dir: {folder} is of format {meta.get('format')} instead of {FORMAT}; "
            "remove that folder and it will be prepared again"
        )
    return PreparedText(
        folder=folder,
        fingerprint=meta["fingerprint"],
        train=TokenStream.open(folder, meta["splits"]["train"], meta["pad_token_id"]),
        held_out=TokenStream.open(folder, meta["splits"]["held_out"], meta["pad_token_id"]),
        held_out_text_path=folder / HELD_OUT_TEXT,
        metadata=meta,
    )


def _survey(source: TextSource) -> Survey:
    surveyor = Surveyor()
    for document in read_documents(source):
        surveyor.add(document)
    survey = surveyor.survey()
    if survey.num_documents == 0:
        raise DataError(
            f"data.path={source.path}: there is no text in it; give a file, folder or data set that has some"
        )
    return survey


def _write(
    partial: Path,
    source: TextSource,
    survey: Survey,
    choice: HeldOutChoice,
    tokenizer: PreTrainedTokenizerBase,
    shard_tokens: int,
) -> dict[str, Any]:
    """Writes both splits and the held-out text; returns what meta.json says of the splits."""
    surveyor = Surveyor()
    with (partial / HELD_OUT_TEXT).open("wb") as held_out_text:
        outputs = {
            "train": SplitOutput(partial, "train", tokenizer, shard_tokens),
            "held_out": SplitOutput(partial, "held_out", tokenizer, shard_tokens, held_out_text),
        }
        for document in read_documents(source):
            index = surveyor.add(document)
            if index != BLANK:
                for split, pieces in choice.sides(document, index):
                    outputs[split].add(pieces)
        splits = {split: output.close() for split, output in outputs.items()}
    if surveyor.survey().content_sha256 != survey.content_sha256:
        raise DataError(f"data.path={source.path}: changed while it was read; try again when it is complete")
    for split, entry in splits.items():
        if entry["num_tokens"] < 2:
            side = "training" if split == "train" else "the held-out split"
            raise DataError(
                f"data.path={source.path}: {survey.num_bytes} bytes of text in {survey.num_documents} "
                f"documents leave nothing for {side}; give more text"
            )
    return splits


def _metadata(
    request: dict[str, Any],
    survey: Survey,
    choice: HeldOutChoice,
    splits: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts = {split: entry["content_sha256"] for split, entry in splits.items()}
    return {
        "format": FORMAT,
        "fingerprint": _sha256([FORMAT, texts, request["tokenizer"]])[:32],
        "content_sha256": survey.content_sha256,
        "source": request["source"],
        "tokenizer": request["tokenizer"],
        "held_out": {"share": request["held_out"], "manner": choice.manner},
        "pad_token_id": pad_token_id or 0,
        "splits": splits,
        "written_with": {
            "python": platform.python_version(),
            **{library: version(library) for library in ("datasets", "numpy", "pyarrow", "tokenizers", "transformers")},
        },
    }


def _make_current(partial: Path, folder: Path) -> None:
    """Renames; where another process was first, its result stays and ours goes."""
    for file in partial.iterdir():
        _sync(file)
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / "meta.json").is_file():
            raise
        shutil.rmtree(partial)
    _sync(folder.parent)


@contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    """A folder of our own to write in, under a lock that dies with the process; gone at the end unless renamed."""
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    lock = partial.with_suffix(".lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _remove_abandoned(cache_dir: Path) -> None:
    """Clears what killed preparations left: the partial folders whose lock nobody holds."""
    for partial in cache_dir.glob("*.partial"):
        lock = partial.with_suffix(".lock")
        with lock.open("w") as held, suppress(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()
