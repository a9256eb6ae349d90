"""Rows in chunks: every token in the chunk and at the column that its number says."""

import torch

from mmada.nn.chunks import Rows

CPU = torch.device("cpu")


def places(rows, size):
    """For every row the number of each token by chunk, read off what ``take`` does with the numbers themselves."""
    batch = len(rows.past_R)
    numbers = rows.past_R[:, None] + torch.arange(rows.length)
    chunks = rows.cut(size)
    taken = chunks.take(numbers, 1)
    valid = torch.ones_like(taken, dtype=torch.bool) if chunks.valid_RPC is None else chunks.valid_RPC
    return [[taken[row, p][valid[row, p]].tolist() for p in range(len(chunks.rows))] for row in range(batch)], chunks


def test_rows_that_agree_need_no_index_where_chunks_are_whole():
    chunks = Rows.even(12).cut(4)
    states = torch.randn(2, 12, 3)
    assert chunks.valid_RPC is None and chunks.opens == [True, True, True]
    assert chunks.take(states, 1).data_ptr() == states.data_ptr()
    assert torch.equal(chunks.put(chunks.take(states, 1), 1), states)


def test_an_open_chunk_is_filled_first():
    found, chunks = places(Rows.even(7, past=6), 4)
    assert found == [[[6, 7], [8, 9, 10, 11], [12]]]
    assert chunks.opens == [False, True, True]
    assert [rows.past_R.tolist() for rows in chunks.rows] == [[2], [0], [0]]
    assert [rows.lengths_R.tolist() if rows.lengths_R is not None else None for rows in chunks.rows] == [[2], None, [1]]


def test_each_row_has_its_own_chunks():
    rows = Rows(5, torch.tensor([3, 0, 9, 4]), torch.tensor([5, 0, 2, 1]), CPU)
    found, chunks = places(rows, 4)
    assert found == [[[3], [4, 5, 6, 7]], [[], []], [[9, 10], []], [[4], []]]
    assert [each.tolist() for each in chunks.opens] == [[False, False, False, True], [True, False, False, False]]
    states = torch.randn(4, 2, 5, 3)
    back = chunks.put(chunks.take(states, 2), 2)
    for row, count in enumerate(rows.new_R):
        assert torch.equal(back[row, :, :count], states[row, :, :count])


def test_one_new_token_takes_one_column_wherever_rows_are():
    chunks = Rows(1, torch.tensor([3, 0, 9]), torch.tensor([1, 1, 1]), CPU).cut(4)
    assert len(chunks.rows) == 1 and chunks.rows[0].length == 1 and chunks.valid_RPC is None
    assert chunks.opens[0].tolist() == [False, True, False]
