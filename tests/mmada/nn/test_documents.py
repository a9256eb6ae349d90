"""Packed rows taken apart and put together."""

import torch

from mmada.config import MMaDAConfig
from mmada.nn.documents import Documents
from tests.mmada.nn.layers import make_context


def test_every_document_is_a_row_that_finds_back():
    numbers = torch.tensor([[0, 0, 0, 1, 2, 2], [7, 7, 7, 7, 3, 7]])
    context = make_context(MMaDAConfig(), 2, 6, documents=numbers, lengths=[6, 5])
    states = torch.randn(2, 6, 4, dtype=torch.float64)
    documents = Documents.of(context)
    rows = documents.split(states)
    assert documents.context.lengths_B.tolist() == [3, 1, 2, 4, 1, 0]
    assert documents.last_B.tolist() == [2, 4]
    assert rows.shape == (6, 4, 4)
    assert torch.equal(rows[3], states[1, :4]) and torch.equal(rows[2, :2], states[0, 4:])
    assert rows[2, 2:].abs().max() == 0
    assert torch.equal(documents.join(rows), states)
    assert Documents.of(context) is documents
