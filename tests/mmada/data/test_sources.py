"""Documents as they are read from each kind of source, and the one line for each way it can fail."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmada.data import TextSource, sources
from mmada.data.sources import describe, read_documents
from mmada.data.stdlib_text import stdlib_fingerprint
from mmada.errors import DataError


def _read(source: TextSource) -> list[str]:
    return ["".join(document.pieces) for document in read_documents(source)]


def _files(path: Path, **fields) -> TextSource:
    return TextSource("files", str(path), **fields)


def _write_parquet(file: Path, **columns: list) -> None:
    pq.write_table(pa.table(columns), file)


@pytest.fixture
def hub_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_folder_is_read_recursively_in_the_order_of_the_paths(tmp_path):
    unread = {"x.bin": "no", ".hidden.txt": "no", ".git/y.txt": "no"}
    for name, text in ({"b.txt": "B", "a/z.md": "Z", "c.TXT": "C"} | unread).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "a" / "rows.jsonl").write_text('{"text": "J0"}\n\n{"text": "J1", "more": 1}')
    _write_parquet(tmp_path / "d.parquet", text=["P0", "P1"])
    assert _read(_files(tmp_path)) == ["J0", "J1", "Z", "B", "C", "P0", "P1"]
    assert _read(_files(tmp_path, limit_documents=3)) == ["J0", "J1", "Z"]
    assert _read(_files(tmp_path / "b.txt")) == ["B"]


def test_text_files_are_read_exactly_and_in_pieces(tmp_path, monkeypatch):
    text = "one\r\ntwo\n\nthree €\rfour" * 50
    (tmp_path / "t.txt").write_bytes(text.encode())
    monkeypatch.setattr(sources, "_PIECE_CHARACTERS", 100)
    (document,) = read_documents(_files(tmp_path))
    pieces = list(document.pieces)
    assert len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert "".join(pieces) == "".join(document.pieces) == text


def test_text_field_and_nulls(tmp_path):
    _write_parquet(tmp_path / "a.parquet", body=["x", None], n=[1, 2])
    (tmp_path / "b.jsonl").write_text('{"body": null}\n{"body": "y"}\n')
    assert _read(_files(tmp_path, text_field="body")) == ["x", "", "", "y"]


def test_hub_reads_a_local_data_set(tmp_path, hub_offline):
    folder = tmp_path / "set"
    folder.mkdir()
    _write_parquet(folder / "train-00000.parquet", text=["a", None, "b"], n=[1, 2, 3])
    _write_parquet(folder / "test-00000.parquet", text=["c"], n=[4])
    assert _read(TextSource("hub", str(folder))) == ["a", "", "b"]
    assert _read(TextSource("hub", str(folder), split="test")) == ["c"]
    assert _read(TextSource("hub", str(folder), split="train[2:]")) == ["b"]


def test_stdlib_is_about_two_megabytes_in_whole_modules_and_topics():
    documents = {document.name: "".join(document.pieces) for document in read_documents(TextSource())}
    names = list(documents)
    assert names == sorted(names)
    assert 500 < len(names) < 1000
    assert 1_500_000 < sum(len(text.encode()) for text in documents.values()) < 4_000_000
    assert sum(name.startswith("topic ") for name in names) > 70
    assert documents["topic assert"].startswith('The "assert" statement')
    assert documents["module textwrap"].startswith("Text wrapping and filling.\n\nObject for wrapping/filling text.")
    assert not [name for name in names if "test" in name.split(" ")[1].split(".")[:-1]]
    assert not {"module test", "module numpy", "module pip"}.intersection(names)
    assert all(text.strip() for text in documents.values())


def test_description_changes_with_the_files_and_only_then(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = describe(_files(tmp_path))
    assert describe(_files(tmp_path)) == first
    (tmp_path / "notes.bin").write_text("not read")
    assert describe(_files(tmp_path)) == first
    (tmp_path / "b.txt").write_text("two")
    second = describe(_files(tmp_path))
    (tmp_path / "b.txt").write_text("three")
    third = describe(_files(tmp_path))
    assert first != second != third
    assert describe(_files(tmp_path, limit_documents=1)) != third
    json.dumps(third)


def test_stdlib_description_is_stable():
    assert describe(TextSource())["stdlib"] == stdlib_fingerprint()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "web"}, "data.source=web is unknown; use stdlib, files or hub"),
        ({"kind": "files"}, "data.path is missing with data.source=files; give a file or a folder"),
        ({"kind": "hub"}, "data.path is missing with data.source=hub; give a data set's name"),
        ({"kind": "stdlib", "path": "x"}, "data.path=x has no meaning with data.source=stdlib; remove it"),
        ({"kind": "files", "path": "x", "text_field": ""}, "data.text_field is empty; name the field"),
        ({"kind": "files", "path": "x", "split": "train"}, "data.split=train has a meaning with data.source=hub only"),
        ({"kind": "stdlib", "config_name": "en"}, "data.config_name=en has a meaning with data.source=hub only"),
        ({"limit_documents": 0}, "data.limit_documents=0 leaves nothing to read; use 1 or more"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(DataError) as caught:
        TextSource(**fields)
    assert message in str(caught.value)


def _expect(source: TextSource, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        _read(source)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message  # the remedy
    for part in parts:
        assert part in message, message


def test_missing_path(tmp_path):
    _expect(_files(tmp_path / "none"), f"data.path={tmp_path / 'none'}: no such file or folder")


def test_folder_or_file_without_text(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    _expect(_files(tmp_path), f"data.path={tmp_path}: the folder holds no file ending in .txt", ".jsonl", ".parquet")
    _expect(_files(tmp_path / "image.png"), "the file's name is not one ending in .txt")


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    _expect(_files(tmp_path), f"data.path={tmp_path}/latin.txt: not UTF-8", "byte 0xe9", "iconv")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": "no end', ["not JSON", "put one JSON object on each line"]),
        (b'{"text": "\xe9"}', ["not JSON", "utf-8"]),
        ('["text"]', ["a JSON list"]),
        ('{"body": "x", "id": 1}', ["data.text_field=text: no such field in", "use one of body, id"]),
        ('{"text": 3}', ["data.text_field=text: ", "holds int, not text"]),
        ('{"text": "\\ud800"}', ["half of a surrogate pair", "'\\ud800'"]),
    ],
)
def test_jsonl_names_file_and_line(tmp_path, line, parts):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    _expect(_files(tmp_path), f"{tmp_path}/rows.jsonl, line 3", *parts)


def test_parquet_faults(tmp_path):
    _write_parquet(tmp_path / "a.parquet", body=["x"], text_length=[1])
    _expect(_files(tmp_path), f"no such field in {tmp_path}/a.parquet; use one of body, text_length")
    _expect(_files(tmp_path, text_field="text_length"), "data.text_field=text_length: ", "row 0 holds int, not text")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is no table PAR1")
    _expect(_files(tmp_path), f"data.path={tmp_path}/a.parquet: cannot be read (", "repair it")
    file = tmp_path / "a.parquet"
    _write_parquet(file, text=["some text"] * 1000)
    damaged = bytearray(file.read_bytes())
    damaged[4:40] = b"\xff" * 36
    file.write_bytes(damaged)
    _expect(_files(tmp_path), f"data.path={tmp_path}/a.parquet: cannot be read (")


def test_hub_faults(tmp_path, hub_offline):
    folder = tmp_path / "set"
    folder.mkdir()
    _expect(TextSource("hub", str(folder)), f"data.path={folder}: the data set cannot be loaded", "data files")
    _write_parquet(folder / "test-00000.parquet", text=["a"])
    _write_parquet(folder / "validation-00000.parquet", text=["a"])
    source = TextSource("hub", str(folder))
    _expect(source, f"data.split is missing and {folder} has several; use one of validation, test")
    _expect(TextSource("hub", str(folder), split="train"), 'data.split=train: Unknown split "train"', "'test'")
    _expect(TextSource("hub", str(folder), split="test", text_field="body"), "data.text_field=body: no such field")
    _expect(TextSource("hub", str(folder), config_name="en"), f"data.path={folder}, data.config_name=en: ", "'default'")
    _expect(TextSource("hub", "nobody/no-such-set"), "data.path=nobody/no-such-set: the data set cannot be loaded")
    _expect(TextSource("hub", str(tmp_path / "none")), f"data.path={tmp_path}/none: the data set cannot be loaded")
