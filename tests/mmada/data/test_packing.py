"""Rows of a token stream, token by token, and the identity that every token is predicted exactly once."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmada.data import IGNORE_INDEX, TokenStream
from mmada.data.tokenizing import SplitOutput
from mmada.errors import DataError
from mmada.tokenizer import ByteTokenizer

PAD, BOS, EOS, A, B, C, D, E, X = 0, 1, 2, *(8 + ord(letter) for letter in "ABCDEX")


def _stream(folder, tokenizer, documents: list[str], shard_tokens: int = 1 << 20) -> TokenStream:
    output = SplitOutput(folder, "train", tokenizer, shard_tokens)
    for document in documents:
        output.add((document,))
    return TokenStream.open(folder, output.close(), tokenizer.pad_token_id or 0)


def _rows(stream: TokenStream, sequence_length: int) -> dict[str, list[list[int]]]:
    rows = stream.rows(sequence_length)
    return {name: tensor.tolist() for name, tensor in rows.batch(np.arange(len(rows))).items()}


def _word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per word, ids w0 = 0 .. w9 = 9, <end> = 10, <begin> = 11; special tokens only as asked."""
    vocabulary = {f"w{i}": i for i in range(10)} | {"<end>": 10, "<begin>": 11}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_two_documents_token_by_token(tmp_path):
    stream = _stream(tmp_path, ByteTokenizer(), ["ABC", "DE"])
    assert (stream.num_tokens, stream.num_bytes, stream.num_documents) == (9, 5, 2)
    # the stream: bos A B C eos | bos D E eos
    assert _rows(stream, 4) == {
        "input_ids": [[BOS, A, B, C], [EOS, BOS, D, E]],
        "shift_labels": [[A, B, C, EOS], [IGNORE_INDEX, D, E, EOS]],
        "position_ids": [[0, 1, 2, 3], [0, 0, 1, 2]],
    }


def test_last_row_is_padded_and_padding_begins_anew(tmp_path):
    stream = _stream(tmp_path, ByteTokenizer(), ["ABC", "DE"])
    assert _rows(stream, 6) == {
        "input_ids": [[BOS, A, B, C, EOS, BOS], [D, E, EOS, PAD, PAD, PAD]],
        "shift_labels": [[A, B, C, EOS, IGNORE_INDEX, D], [E, EOS] + 4 * [IGNORE_INDEX]],
        "position_ids": [[0, 1, 2, 3, 4, 0], [0, 1, 2, 0, 1, 2]],
    }


def test_a_row_longer_than_the_text(tmp_path):
    assert _rows(_stream(tmp_path, ByteTokenizer(), ["A"]), 8) == {
        "input_ids": [[BOS, A, EOS] + 5 * [PAD]],
        "shift_labels": [[A, EOS] + 6 * [IGNORE_INDEX]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3, 4]],
    }


def test_rows_of_one_token(tmp_path):
    assert _rows(_stream(tmp_path, ByteTokenizer(), ["A", "B"]), 1) == {
        "input_ids": [[BOS], [A], [EOS], [BOS], [B]],
        "shift_labels": [[A], [EOS], [IGNORE_INDEX], [B], [EOS]],
        "position_ids": [[0]] * 5,
    }


def test_end_token_but_no_begin_token(tmp_path):
    stream = _stream(tmp_path, _word_tokenizer(eos_token="<end>"), ["w1 w2", "w3 w4 w5"])
    assert stream.num_tokens == 7
    assert _rows(stream, 6) == {
        "input_ids": [[1, 2, 10, 3, 4, 5]],
        "shift_labels": [[2, 10, IGNORE_INDEX, 4, 5, 10]],
        "position_ids": [[0, 1, 2, 0, 1, 2]],
    }


def test_neither_begin_nor_end_token(tmp_path):
    assert _rows(_stream(tmp_path, _word_tokenizer(), ["w1 w2", "w3", "w4 w5"]), 4) == {
        "input_ids": [[1, 2, 3, 4]],
        "shift_labels": [[2, IGNORE_INDEX, IGNORE_INDEX, 5]],
        "position_ids": [[0, 1, 0, 0]],
    }


def test_special_tokens_spelled_in_a_text_make_no_boundary(tmp_path):
    tokenizer = _word_tokenizer(bos_token="<begin>", eos_token="<end>")
    stream = _stream(tmp_path, tokenizer, ["w1 <begin> w2", "w3"])
    tokens, starts = stream.read(0, stream.num_tokens)
    assert starts.tolist() == [0, len(tokens) - 3]
    assert tokens.tolist().count(11) == 2
    assert tokens.tolist()[-3:] == [11, 3, 10]


def _predicted(stream: TokenStream, sequence_length: int) -> list[tuple[int, int]]:
    """(position in the stream, label) of everything that some row predicts."""
    rows = stream.rows(sequence_length)
    batch = rows.batch(np.arange(len(rows)))
    assert all(tensor.shape == (len(rows), sequence_length) for tensor in batch.values())
    labels = batch["shift_labels"].numpy().ravel()
    return [(int(i) + 1, int(labels[i])) for i in np.flatnonzero(labels != IGNORE_INDEX)]


@pytest.mark.parametrize("sequence_length", [1, 2, 3, 7, 16, 64, 100, 1023, 5000])
@pytest.mark.parametrize("shard_tokens", [50, 1 << 20])
def test_every_token_is_predicted_exactly_once(tmp_path, sequence_length, shard_tokens):
    random = np.random.default_rng(0)
    documents = ["".join(random.choice(list("abc €\n"), size=int(n))) for n in random.geometric(1 / 40, size=60)]
    stream = _stream(tmp_path, ByteTokenizer(), documents, shard_tokens)
    whole = [token for text in documents for token in (BOS, *(byte + 8 for byte in text.encode()), EOS)]
    predicted = _predicted(stream, sequence_length)
    assert predicted == [(i, token) for i, token in enumerate(whole) if token != BOS]
    assert len(predicted) == stream.num_bytes + stream.num_documents == stream.num_tokens - stream.num_documents


@pytest.mark.parametrize("sequence_length", [1, 3, 10, 64, 200])
@pytest.mark.parametrize("special", [{}, {"eos_token": "<end>"}])
def test_every_token_but_a_documents_first_is_predicted_once_without_begin_tokens(tmp_path, sequence_length, special):
    documents = [" ".join(f"w{(i * j) % 10}" for j in range(1, i + 2)) for i in range(25)]
    tokenizer = _word_tokenizer(**special)
    stream = _stream(tmp_path, tokenizer, documents, shard_tokens=17)
    end = [10] * len(special)
    expected, position = [], 0
    for text in documents:
        tokens = [int(word[1]) for word in text.split()] + end
        expected += [(position + i, token) for i, token in enumerate(tokens)][1:]
        position += len(tokens)
    assert _predicted(stream, sequence_length) == expected


def test_positions_restart_exactly_at_documents_rows_and_padding(tmp_path):
    documents = ["x" * n for n in (1, 5, 2, 30, 1, 9)]
    stream = _stream(tmp_path, ByteTokenizer(), documents, shard_tokens=11)
    rows = stream.rows(8)
    batch = rows.batch(np.arange(len(rows)))
    starts = np.cumsum([0] + [len(text) + 2 for text in documents])  # the last one is where padding starts
    for i, positions in enumerate(batch["position_ids"].tolist()):
        for t, position in enumerate(positions):
            newest = max([i * 8] + [int(start) for start in starts if i * 8 <= start <= i * 8 + t])
            assert position == i * 8 + t - newest


def test_batches_are_rows_in_the_order_asked_for(tmp_path):
    rows = _stream(tmp_path, ByteTokenizer(), ["ABCDE" * 9, "X" * 30]).rows(5)
    whole = rows.batch(np.arange(len(rows)))
    indices = np.array([3, 0, 3, len(rows) - 1])
    for name, tensor in rows.batch(indices).items():
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, whole[name][indices], rtol=0, atol=0)
    assert rows.batch(np.array([], dtype=np.int64))["input_ids"].shape == (0, 5)


def test_wrong_rows_and_lengths(tmp_path):
    stream = _stream(tmp_path, ByteTokenizer(), ["ABC"])
    for index in (-1, 2):
        with pytest.raises(IndexError, match=r"rows are 0\.\.1"):
            stream.rows(2).batch(np.array([0, index]))
    with pytest.raises(DataError, match=r"train\.sequence_length=0 is too short; use 1 or more"):
        stream.rows(0)
