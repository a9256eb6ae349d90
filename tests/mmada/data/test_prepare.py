"""Preparing: what lands on disk, what is reused, and what happens when it is killed, raced or damaged."""

import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmada.data import PreparedText, TextSource, TokenStream, open_prepared, prepare, sources
from mmada.data import prepare as prepare_function
from mmada.data.sources import read_documents
from mmada.errors import DataError
from mmada.tokenizer import ByteTokenizer

prepare_module = sys.modules[prepare_function.__module__]


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory) -> PreparedText:
    return prepare(TextSource(), ByteTokenizer(), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def corpus(tmp_path) -> TextSource:
    """Fifty documents of 4 to 600 bytes, all different."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    with (folder / "rows.jsonl").open("w") as stream:
        for i in range(50):
            stream.write(json.dumps({"text": f"€{i} " * (1 + i * 2)}) + "\n")
    return TextSource("files", str(folder))


def _documents(stream: TokenStream) -> list[bytes]:
    """The documents' bytes, back from the tokens; begin and end tokens checked."""
    tokens, starts = stream.read(0, stream.num_tokens)
    texts = []
    for document in np.split(tokens.astype(np.int64), starts[1:]):
        assert (document[0], document[-1]) == (1, 2)
        assert document[1:-1].min() >= 8
        texts.append((document[1:-1] - 8).astype(np.uint8).tobytes())
    return texts


def _texts(source: TextSource) -> list[bytes]:
    return ["".join(document.pieces).encode() for document in read_documents(source)]


def _one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_stdlib_documents_arrive_whole_on_one_side_each(stdlib):
    train, held_out = _documents(stdlib.train), _documents(stdlib.held_out)
    assert sorted(train + held_out) == sorted(_texts(TextSource()))
    assert (len(train), len(held_out)) == (stdlib.train.num_documents, stdlib.held_out.num_documents)
    assert (sum(map(len, train)), sum(map(len, held_out))) == (stdlib.train.num_bytes, stdlib.held_out.num_bytes)
    share = stdlib.held_out.num_bytes / (stdlib.held_out.num_bytes + stdlib.train.num_bytes)
    assert 0.045 < share <= 0.05
    assert stdlib.train.num_tokens == stdlib.train.num_bytes + 2 * stdlib.train.num_documents
    assert stdlib.held_out_text_path.read_bytes() == b"".join(held_out)


def test_stdlib_is_the_same_every_time_and_not_read_again(stdlib, tmp_path, monkeypatch):
    again = prepare(TextSource(), ByteTokenizer(), tmp_path)
    assert again.fingerprint == stdlib.fingerprint
    assert again.folder.name == stdlib.folder.name
    for file in again.folder.iterdir():
        assert file.read_bytes() == (stdlib.folder / file.name).read_bytes(), file
    monkeypatch.setattr(prepare_module, "read_documents", None)
    assert prepare(TextSource(), ByteTokenizer(), tmp_path).fingerprint == stdlib.fingerprint


def test_metadata_says_what_is_there(stdlib, corpus, tmp_path):
    meta = stdlib.metadata
    assert meta["splits"]["train"]["dtype"] == "uint16"
    assert meta["held_out"] == {"share": 0.05, "manner": "whole documents"}
    assert re.fullmatch(r"[0-9a-f]{64}", meta["content_sha256"])
    assert meta["source"]["stdlib"]["library"].startswith("CPython 3.")
    assert meta["written_with"]["pyarrow"] == pa.__version__
    assert meta["tokenizer"]["class"] == "ByteTokenizer"
    assert meta == json.loads((stdlib.folder / "meta.json").read_text())
    files = {shard["file"] for split in meta["splits"].values() for shard in split["shards"]}
    assert {file.name for file in stdlib.folder.iterdir()} == files | {"meta.json", "held_out.txt"}


def test_fingerprint_is_of_the_content_and_the_folder_of_the_request(corpus, tmp_path):
    base = prepare(corpus, ByteTokenizer(), tmp_path / "cache")
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    (copy / "other.jsonl").write_bytes((Path(corpus.path) / "rows.jsonl").read_bytes())
    moved = prepare(TextSource("files", str(copy)), ByteTokenizer(), tmp_path / "cache")
    assert moved.fingerprint == base.fingerprint
    assert moved.folder != base.folder
    others = [
        prepare(corpus, ByteTokenizer(num_image_codes=1), tmp_path / "cache"),
        prepare(corpus, ByteTokenizer(), tmp_path / "cache", held_out=0.3),
        prepare(TextSource("files", corpus.path, limit_documents=49), ByteTokenizer(), tmp_path / "cache"),
    ]
    with (Path(corpus.path) / "rows.jsonl").open("a") as stream:
        stream.write('{"text": "one more"}\n')
    others.append(prepare(corpus, ByteTokenizer(), tmp_path / "cache"))
    assert len({prepared.fingerprint for prepared in [base, *others]}) == 5
    assert others[-1].train.num_documents + others[-1].held_out.num_documents == 51


def test_shards_do_not_show_in_the_stream(corpus, tmp_path):
    one = prepare(corpus, ByteTokenizer(), tmp_path / "one")
    many = prepare(corpus, ByteTokenizer(), tmp_path / "many", shard_tokens=1000)
    assert (len(one.metadata["splits"]["train"]["shards"]), one.fingerprint) == (1, many.fingerprint)
    assert len(many.metadata["splits"]["train"]["shards"]) > 10
    assert _documents(one.train) == _documents(many.train)
    random = np.random.default_rng(0)
    for _ in range(200):
        begin, end = sorted(random.integers(0, one.train.num_tokens, 2).tolist())
        for a, b in zip(one.train.read(begin, end + 1), many.train.read(begin, end + 1), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_token_slice_lies_in_the_mapped_file(stdlib):
    tokens, _ = stdlib.train.read(1000, 2000)
    assert not tokens.flags.owndata
    address = tokens.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            assert line.endswith(str(stdlib.folder / "train-00000.arrow"))
            return
    pytest.fail("the tokens are in no mapping of this process")


def test_datasets_opens_a_shard(stdlib):
    shard = datasets.Dataset.from_file(str(stdlib.folder / "held_out-00000.arrow"))
    assert len(shard) == stdlib.held_out.num_documents
    assert all(shard["starts_document"])
    assert bytes(i - 8 for i in shard[0]["tokens"][1:-1]) == _documents(stdlib.held_out)[0]


def test_a_long_document_is_written_in_pieces_and_stays_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PIECE_CHARACTERS", 64)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"{name}€ line\n" * 100)
    prepared = prepare(TextSource("files", str(folder)), ByteTokenizer(), tmp_path / "cache", 0.2, shard_tokens=100)
    assert sorted(_documents(prepared.train) + _documents(prepared.held_out)) == [
        (f"{name}€ line\n" * 100).encode() for name in "abc"
    ]
    assert (prepared.train.num_documents, prepared.held_out.num_documents) == (2, 1)


def test_a_single_document_gives_its_tail_and_says_so(tmp_path):
    (tmp_path / "only.txt").write_text("0123456789" * 10)
    prepared = prepare(TextSource("files", str(tmp_path / "only.txt")), ByteTokenizer(), tmp_path / "cache", 0.1)
    assert _documents(prepared.train) == [b"0123456789" * 9]
    assert _documents(prepared.held_out) == [b"0123456789"]
    assert prepared.metadata["held_out"]["manner"] == ("the tail from byte 90 on, since all the text is one document")


def test_copies_never_straddle_the_split(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "number {i % 40}"}}\n' for i in range(200)))
    prepared = prepare(TextSource("files", str(tmp_path / "t.jsonl")), ByteTokenizer(), tmp_path / "cache", 0.2)
    train, held_out = set(_documents(prepared.train)), set(_documents(prepared.held_out))
    assert (len(train & held_out), len(train | held_out)) == (0, 40)
    assert prepared.train.num_documents == 5 * len(train)


@pytest.mark.parametrize("vocab_size", [256, 400])
def test_a_hugging_face_tokenizer_in_the_smallest_type(corpus, tmp_path, vocab_size):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = _texts(corpus)
    backend.train_from_iterator([text.decode() for text in texts], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    prepared = prepare(corpus, tokenizer, tmp_path / "cache")
    tokens, starts = prepared.train.read(0, prepared.train.num_tokens)
    assert tokens.dtype == (np.uint8 if len(tokenizer) <= 256 else np.uint16)
    decoded = [tokenizer.decode(document).encode() for document in np.split(tokens, starts[1:])]
    assert len(decoded) == prepared.train.num_documents
    assert set(decoded) < set(texts)
    tokenizer(["a", "bb bb"], padding=False, truncation=True, max_length=1)
    assert prepare(corpus, tokenizer, tmp_path / "cache").folder == prepared.folder


def test_hub_data_is_prepared_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")
    (tmp_path / "set").mkdir()
    texts = [f"row {i}" for i in range(40)]
    pq.write_table(pa.table({"text": [*texts, None, " "]}), tmp_path / "set" / "train.parquet")
    prepared = prepare(TextSource("hub", str(tmp_path / "set")), ByteTokenizer(), tmp_path / "cache")
    assert sorted(_documents(prepared.train) + _documents(prepared.held_out)) == sorted(t.encode() for t in texts)


KILLED = """
import sys, time
from mmada.data import TextSource, prepare
from mmada.data.shards import ShardWriter
from mmada.tokenizer import ByteTokenizer

write_batch, calls = ShardWriter._write_batch, []

def stalling(self):
    write_batch(self)
    calls.append(1)
    if len(calls) == 3:
        print("half way", flush=True)
        time.sleep(600)

ShardWriter._write_batch = stalling
prepare(TextSource("files", sys.argv[1]), ByteTokenizer(), sys.argv[2], shard_tokens=1000)
"""


def test_a_killed_preparation_leaves_nothing_half_done(corpus, tmp_path):
    cache = tmp_path / "cache"
    with subprocess.Popen([sys.executable, "-c", KILLED, corpus.path, str(cache)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half way\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    (partial,) = cache.glob("*.partial")
    assert len(list(partial.glob("train-*.arrow"))) == 3
    assert not list(cache.glob("*/meta.json"))
    prepared = prepare(corpus, ByteTokenizer(), cache, shard_tokens=1000)
    assert sorted(_documents(prepared.train) + _documents(prepared.held_out)) == sorted(_texts(corpus))
    assert list(cache.iterdir()) == [prepared.folder]


def test_of_two_at_once_one_result_stays(corpus, tmp_path, monkeypatch):
    cache, make_current, inner = tmp_path / "cache", prepare_module._make_current, []

    def overtaken(partial: Path, folder: Path) -> None:
        monkeypatch.setattr(prepare_module, "_make_current", make_current)
        inner.append(prepare(corpus, ByteTokenizer(), cache))
        assert partial.is_dir()  # the second process cleared away what is abandoned, and this is not
        make_current(partial, folder)

    monkeypatch.setattr(prepare_module, "_make_current", overtaken)
    outer = prepare(corpus, ByteTokenizer(), cache)
    assert outer.folder == inner[0].folder
    assert _documents(outer.train) == _documents(inner[0].train)
    assert list(cache.iterdir()) == [outer.folder]


def test_a_full_disk_is_named_and_leaves_nothing(corpus, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the kernel refuses what is longer
    try:
        with pytest.raises(DataError) as caught:
            prepare(corpus, ByteTokenizer(), tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"data.cache_dir={tmp_path / 'cache'}: cannot be written (File too large); free space" in _one_line(caught)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_folder_that_is_none(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as caught:
        prepare(corpus, ByteTokenizer(), tmp_path / "file" / "cache")
    assert f"data.cache_dir={tmp_path / 'file' / 'cache'}: cannot be written (Not a directory)" in _one_line(caught)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.unlink(), "train-00000.arrow is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), r"train-00000.arrow has \d+ bytes instead of \d+"),
        (lambda file: file.write_bytes(b"\0" * file.stat().st_size), "train-00000.arrow: |0 tokens instead of"),
    ],
)
def test_damaged_data_is_refused_by_name(corpus, tmp_path, damage, reason):
    prepared = prepare(corpus, ByteTokenizer(), tmp_path / "cache")
    folder = prepared.folder
    del prepared
    damage(folder / "train-00000.arrow")
    for reopen in (lambda: open_prepared(folder), lambda: prepare(corpus, ByteTokenizer(), tmp_path / "cache")):
        with pytest.raises(DataError) as caught:
            reopen()
        assert re.search(reason, _one_line(caught))
        assert f"{folder} is damaged" in str(caught.value)
        assert "remove that folder" in str(caught.value)


def test_a_folder_that_holds_nothing_prepared(corpus, tmp_path):
    with pytest.raises(DataError, match="holds no prepared data"):
        open_prepared(tmp_path)
    (tmp_path / "meta.json").write_text('{"format": 0}')
    with pytest.raises(DataError, match="is of format 0 instead of 1; remove that folder"):
        open_prepared(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no text in it; give a file"),
        (" \n\t\n", "there is no text in it; give a file"),
        ("x", "1 bytes of text in 1 documents leave nothing for training; give more text"),
    ],
)
def test_too_little_text(tmp_path, text, message):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(DataError) as caught:
        prepare(TextSource("files", str(tmp_path / "t.txt")), ByteTokenizer(), tmp_path / "cache")
    assert f"data.path={tmp_path / 't.txt'}: {message}" in _one_line(caught)
    assert not list((tmp_path).glob("cache/*"))


def test_faults_in_the_text_are_found_before_anything_is_written(corpus, tmp_path):
    with (Path(corpus.path) / "rows.jsonl").open("a") as stream:
        stream.write('{"text": 1}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 51 holds int"):
        prepare(corpus, ByteTokenizer(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_text_that_changes_while_it_is_read(corpus, tmp_path, monkeypatch):
    choose = prepare_module.choose_held_out

    def growing(survey, share):
        with (Path(corpus.path) / "rows.jsonl").open("a") as stream:
            stream.write('{"text": "more"}\n')
        return choose(survey, share)

    monkeypatch.setattr(prepare_module, "choose_held_out", growing)
    with pytest.raises(DataError) as caught:
        prepare(corpus, ByteTokenizer(), tmp_path / "cache")
    assert f"data.path={corpus.path}: changed while it was read; try again" in _one_line(caught)
    assert list((tmp_path / "cache").iterdir()) == []
