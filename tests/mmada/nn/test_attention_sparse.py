"""Block-sparse attention: which blocks are chosen, and that the result is that of the whole scores under this mask."""

import pytest
import torch
from torch.testing import assert_close

from mmada.nn.attention.block_pattern import BlockPattern
from mmada.nn.mixers.attention import Attention
from tests.mmada.nn.attention_layers import make_attention, random_states
from tests.mmada.nn.layers import run_mixer

PATTERN = BlockPattern(size=8, num_window=3, num_global=2, num_random=2, layer_idx=1)


def test_window_global_and_random_blocks_are_chosen_once_each():
    for block, chosen in enumerate(PATTERN.chosen(torch.arange(60)).tolist()):
        window, first, drawn = chosen[:3], chosen[3:5], chosen[5:]
        assert window == [max(block - back, -1) for back in range(3)]
        assert first == [number if number <= block - 3 else -1 for number in range(2)]
        free = max(0, block - 2 - 2)  # neither window nor global
        real = [number for number in drawn if number != -1]
        assert len(real) == min(2, free) and all(2 <= number <= block - 3 for number in real)
        seen = [number for number in chosen if number != -1]
        assert len(seen) == len(set(seen))


def test_random_blocks_depend_on_layer_and_block_alone():
    blocks = torch.arange(400)
    chosen = PATTERN.chosen(blocks)
    assert torch.equal(PATTERN.chosen(blocks[37:41]), chosen[37:41])
    other = BlockPattern(size=8, num_window=3, num_global=2, num_random=2, layer_idx=2).chosen(blocks)
    assert torch.equal(other[:, :5], chosen[:, :5]) and not torch.equal(other[:, 5:], chosen[:, 5:])
    # All over what is free: each of two parts on average in its middle.
    place = (chosen[100:, 5:] - 2) / (blocks[100:, None] - 4)
    assert_close(place.mean(dim=0), torch.tensor([0.25, 0.75]), rtol=0, atol=0.03)
    assert place[:, 0].std() > 0.1


def test_the_table_has_just_the_chosen_blocks():
    table = PATTERN.table(30, torch.device("cpu"))
    for row, chosen in zip(table, PATTERN.chosen(torch.arange(30)).tolist(), strict=True):
        assert row.nonzero().flatten().tolist() == sorted(number for number in chosen if number != -1)
    assert not table.triu(1).any()


@pytest.mark.parametrize("length", [1, 63, 100, 128])
def test_equals_the_whole_scores_under_the_expanded_mask(length):
    layer = make_attention("sparse", sparse_window_blocks=1, sparse_random_blocks=2, position_embedding_type="none")
    states = random_states(2, length)
    blocks = layer.pattern.table(16, torch.device("cpu"))
    expanded = blocks.repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)[:length, :length].tril()
    assert length < 100 or expanded.sum() < 0.6 * length * (length + 1) / 2
    query, key, value = (
        proj(states).view(2, length, -1, 4).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=expanded, enable_gqa=True)
    assert_close(run_mixer(layer, states), layer.o_proj(mixed.transpose(1, 2).flatten(2)), rtol=1e-6, atol=1e-9)


def test_layers_draw_their_own_random_blocks():
    first = make_attention("sparse", sparse_window_blocks=1)
    second = Attention(first.config, 1, kind="sparse").double()
    second.load_state_dict(first.state_dict())
    states = random_states(1, 128)
    assert not torch.allclose(run_mixer(first, states)[:, 32:], run_mixer(second, states)[:, 32:])
