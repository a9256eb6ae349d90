"""Which documents are held out, and where a single one is cut."""

import numpy as np
import pytest

from mmada.data.sources import Document
from mmada.data.splitting import BLANK, HeldOutChoice, Survey, Surveyor, check_share, choose_held_out
from mmada.errors import DataError


def _look_at(documents: list[Document]) -> tuple[Survey, list[int]]:
    surveyor = Surveyor()
    bins = [surveyor.add(document) for document in documents]
    return surveyor.survey(), bins


def _texts(texts: list[str]) -> list[Document]:
    return [Document(str(i), (text,)) for i, text in enumerate(texts)]


def _held_out(texts: list[str], share: float) -> list[str]:
    documents = _texts(texts)
    survey, bins = _look_at(documents)
    choice = choose_held_out(survey, share)
    assert choice.tail_begins_at is None
    sides = [next(iter(choice.sides(document, index)))[0] for document, index in zip(documents, bins, strict=True)]
    return [text for text, side in zip(texts, sides, strict=True) if side == "held_out"]


def _cut(choice: HeldOutChoice, document: Document) -> dict[str, str]:
    return {split: "".join(pieces) for split, pieces in choice.sides(document, 0)}


def test_survey_counts_bytes_and_leaves_blank_texts_out():
    survey, bins = _look_at(_texts(["é", " \n", "", "ab"]))
    assert (survey.num_documents, survey.num_bytes, survey.bytes_per_bin.sum()) == (2, 4, 4)
    assert [index == BLANK for index in bins] == [False, True, True, False]


def test_content_hash_sees_order_and_boundaries_but_not_pieces():
    hashes = [_look_at(_texts(texts))[0].content_sha256 for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"])]
    assert len(set(hashes)) == 3
    in_pieces = [Document("0", ("a", "b")), Document("1", ("c",))]
    assert _look_at(in_pieces)[0].content_sha256 == hashes[0]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_share_of_bytes_comes_close(share):
    lengths = np.random.default_rng(0).geometric(1 / 500, size=3000)
    texts = [f"{i} " + "x" * int(length) for i, length in enumerate(lengths)]
    held = sum(map(len, _held_out(texts, share)))
    total = sum(map(len, texts))
    assert 0.985 * share <= held / total <= share


def test_a_document_larger_than_the_share_is_passed_over():
    texts = ["x" * 10_000, *(f"{i}" * 40 for i in range(10, 60))]
    for salt in range(20):
        held = _held_out([f"{salt} {text}" for text in texts], 0.05)
        assert held
        assert max(map(len, held)) < 100


def test_at_least_one_document_on_each_side():
    for salt in range(20):
        assert len(_held_out([f"one {salt}", f"two {salt}"], 0.01)) == 1
        assert len(_held_out([f"one {salt}", f"two {salt}"], 0.99)) == 1


def test_copies_stay_together_and_order_does_not_matter():
    texts = [f"text {i % 200}" for i in range(1000)]
    held = _held_out(texts, 0.1)
    assert 15 <= len(set(held)) <= 20
    assert len(held) == 5 * len(set(held))
    assert set(_held_out(texts[::-1], 0.1)) == set(held)


def test_group_decides_in_place_of_the_text():
    _, (a, b, c) = _look_at([Document("0", ("x",), "g"), Document("1", ("y",), "g"), Document("2", ("x",), "h")])
    assert a == b != c


def test_a_single_document_loses_its_tail():
    document = Document("0", ("0123456789" * 3, "0123456789" * 7))
    choice = choose_held_out(_look_at([document])[0], 0.05)
    assert choice.tail_begins_at == 95
    assert "tail from byte 95" in choice.manner
    assert _cut(choice, document) == {"train": ("0123456789" * 10)[:95], "held_out": "56789"}


def test_the_cut_falls_between_characters():
    text = "a€" * 40
    for share in (0.05, 0.051, 0.052, 0.06):
        parts = _cut(choose_held_out(_look_at(_texts([text]))[0], share), Document("0", (text[:33], text[33:])))
        assert parts["train"] + parts["held_out"] == text
        assert 0 < len(parts["held_out"].encode()) <= round(share * 160) + 2


def test_copies_of_a_single_document_lose_the_same_tail():
    documents = _texts(["0123456789"] * 3)
    choice = choose_held_out(_look_at(documents)[0], 0.2)
    assert [_cut(choice, document)["held_out"] for document in documents] == ["89"] * 3


def test_two_bytes_give_one_to_each_side():
    documents = _texts(["ab"])
    assert _cut(choose_held_out(_look_at(documents)[0], 0.05), documents[0]) == {"train": "a", "held_out": "b"}


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_share_must_be_one(share):
    with pytest.raises(DataError, match=r"data\.held_out=.*between 0 and 1"):
        check_share(share)
