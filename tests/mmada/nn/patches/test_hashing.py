"""Hashes of byte n-grams against published values and transformers' function."""

import pytest
import torch
from transformers.models.blt.modeling_blt import byte_group_hash_function

from mmada.nn.patches.hashing import ngram_hashes


@pytest.mark.parametrize(("ids", "expected"), [((101, 36, 72), 209281), ((101, 36, 72, 5, 6, 7, 8, 9), 298786)])
def test_known_values(ids, expected):
    hashes = ngram_hashes(torch.tensor([ids]), [len(ids)], 500002, torch.arange(len(ids))[None])
    assert hashes[0, -1].item() == expected


def test_equals_transformers_at_every_position():
    ids = torch.randint(0, 264, (3, 41), generator=torch.Generator().manual_seed(0))
    sizes = [1, 3, 4, 5, 6, 7, 8]
    ours = ngram_hashes(ids, sizes, 5003, torch.arange(41)[None])
    for column, size in enumerate(sizes):
        assert torch.equal(ours[..., column], byte_group_hash_function(ids, size, max_hash=5003))
    assert ours.min() >= 0 and ours.max() < 5003


def test_ids_before_a_document_count_for_nothing():
    ids = torch.randint(8, 264, (1, 17), generator=torch.Generator().manual_seed(1))
    index = torch.cat([torch.arange(6), torch.arange(11)])[None]
    packed = ngram_hashes(ids, [3, 8], 977, index)
    assert torch.equal(packed[:, 6:], ngram_hashes(ids[:, 6:], [3, 8], 977, torch.arange(11)[None]))
