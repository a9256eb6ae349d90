"""Stop texts, as tokens come: in bytes, and with any tokenizer by decoding."""

import pytest

from mmada.generation.stopping import TextWatch, watch
from mmada.tokenizer import BYTE_OFFSET, MASK_ID, ByteTokenizer


def ended_at(watch, ids):
    """The number of the token that completes a text; None where none does."""
    return next((index for index, token in enumerate(ids) if watch.push(token)), None)


@pytest.mark.parametrize("make", [watch, TextWatch], ids=["bytes", "text"])
@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (("b",), "abc", 1),
        (("bc", "x"), "abcx", 2),
        (("aab",), "aaab", 3),  # begins again inside of a failed match
        (("abab",), "abaabab", 6),
        (("é!",), "aé!b", 3),  # é is two bytes
        (("😀",), "x😀", 4),
        (("\n\n",), "a\nb\n\nc", 4),
        (("abc",), "ababab", None),
        (("ca", "bca"), "abca", 3),
    ],
)
def test_the_token_that_completes_a_text(make, stop, text, expected):
    tokenizer = ByteTokenizer()
    ids = [byte + BYTE_OFFSET for byte in text.encode()]
    assert ended_at(make(stop, tokenizer), ids) == expected


@pytest.mark.parametrize("make", [watch, TextWatch], ids=["bytes", "text"])
def test_special_tokens_are_no_text(make):
    ids = [ord("a") + BYTE_OFFSET, MASK_ID, ord("b") + BYTE_OFFSET]
    assert ended_at(make(("ab",), ByteTokenizer()), ids) == 2
    assert ended_at(make(("mask",), ByteTokenizer()), ids) is None


def test_without_texts_nobody_watches():
    assert watch((), None) is None
