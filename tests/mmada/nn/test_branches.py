"""A branch of a layer against the layers inside it on the branch's tokens alone."""

import pytest
import torch
from torch.testing import assert_close

from mmada.config import MMaDAConfig
from mmada.nn.branches import BranchState, run_branch
from mmada.nn.cache import MMaDACache
from mmada.nn.mixers.attention import Attention
from mmada.nn.slots import SlotMemory
from tests.mmada.nn.layers import make_context

WIDTH = 12
EXACT = {"rtol": 1e-6, "atol": 1e-9}


class Inside(torch.nn.Module):
    """Keys and values, and something recurrent that counts its tokens."""

    def __init__(self):
        super().__init__()
        hybrid = {"memory_slots": 3, "memory_chunk_size": 2}
        self.config = MMaDAConfig(hidden_size=WIDTH, num_attention_heads=2, num_hidden_layers=1, hybrid=hybrid)
        self.config._attn_implementation = "sdpa"
        self.attention, self.memory, self.calls = Attention(self.config, 0), SlotMemory(self.config, 0), 0

    def forward(self, hidden, context, cache):
        self.calls += 1
        return self.attention(hidden, context, cache)[0] + self.memory(hidden, context, cache), None


@pytest.fixture
def inside():
    torch.manual_seed(0)
    layer = Inside().double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def tokens(batch, length):
    """Hidden states, and which of them the branch takes."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=generator)
    return hidden, torch.rand(batch, length, generator=generator) < 0.4


def run(inside, hidden, takes, *, cache=None, lengths=None, documents=None):
    context = make_context(inside.config, *takes.shape, cache=cache, lengths=lengths, documents=documents)
    valid = context.valid_BT()
    state = None if cache is None else cache.layers[0].part("branch", lambda: BranchState(0))
    output = run_branch(inside, hidden, takes if valid is None else takes & valid, context, state)
    if cache is not None:
        cache.advance(takes.shape[1], valid)
    return output


def alone(inside, hidden_TD, takes_T, numbers_T=None):
    """The layers inside on one row's taken tokens, with the positions of the whole row."""
    numbers_T = torch.arange(len(takes_T)) if numbers_T is None else numbers_T
    whole = make_context(inside.config, 1, 64)
    context = make_context(inside.config, 1, int(takes_T.sum()))
    context.rotary = tuple(each[:, numbers_T[takes_T]] for each in whole.rotary)
    output = torch.zeros_like(hidden_TD)
    if takes_T.any():
        output[takes_T] = inside(hidden_TD[takes_T][None], context, None)[0][0]
    return output


def test_the_layers_inside_see_the_branchs_tokens_and_no_others(inside):
    hidden, takes = tokens(4, 20)
    takes[1], takes[2] = True, False
    output = run(inside, hidden, takes, lengths=[20, 13, 20, 9])
    for row, length in enumerate([20, 13, 20, 9]):
        assert_close(output[row, :length], alone(inside, hidden[row, :length], takes[row, :length]), **EXACT)
        assert output[row, length:].abs().max() == 0 if length < 20 else True


def test_documents_stay_apart(inside):
    hidden, takes = tokens(1, 16)
    documents = torch.tensor([[0] * 7 + [1] * 9])
    output = run(inside, hidden, takes, documents=documents)
    expected = [alone(inside, hidden[0, part], takes[0, part]) for part in (slice(0, 7), slice(7, 16))]
    assert_close(output[0], torch.cat(expected), **EXACT)


def test_a_branch_that_nobody_takes_is_not_called_unless_asked_to(inside):
    hidden, takes = tokens(2, 5)
    nobody, context = torch.zeros_like(takes), make_context(inside.config, 2, 5)
    assert run_branch(inside, hidden, nobody, context).abs().max() == 0
    assert inside.calls == 0
    output = run_branch(inside.train(), hidden.requires_grad_(), nobody, context, always=True)
    assert inside.calls == 1 and output.abs().max() == 0
    output.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in inside.parameters())


def test_decoding_in_ragged_pieces_equals_the_rows_at_once(inside):
    hidden, takes = tokens(3, 24)
    takes[2, :12] = False
    cache, seen, outputs = MMaDACache(1), [0, 0, 0], [[], [], []]
    for lengths in ([4, 0, 7], [1, 1, 1], [1, 1, 1], [5, 9, 0], [1, 1, 1], [0, 4, 8]):
        width = max(lengths)
        columns = [torch.arange(seen[row], seen[row] + width).clamp(max=23) for row in range(3)]
        new, new_takes = (torch.stack([each[row, columns[row]] for row in range(3)]) for each in (hidden, takes))
        output = run(inside, new, new_takes, cache=cache, lengths=lengths)
        for row, length in enumerate(lengths):
            outputs[row].append(output[row, :length])
            seen[row] += length
    for row, length in enumerate(seen):
        assert_close(torch.cat(outputs[row]), alone(inside, hidden[row, :length], takes[row, :length]), **EXACT)
    assert cache.layers[0].parts["branch"].past_B.tolist() == [int(takes[row, : seen[row]].sum()) for row in range(3)]


@pytest.mark.parametrize("removed", [1, 4, 8])
def test_crop_takes_back_what_came_of_the_removed_tokens(inside, removed):
    """Rows differ in how many of the removed tokens came, and the pass before had padding."""
    hidden, takes = tokens(3, 30)
    takes[2, 8:20] = False
    cache = MMaDACache(1)
    cache.activate_past_recording()
    run(inside, hidden[:, :6], takes[:, :6], cache=cache)
    cache.crop(0)
    run(inside, hidden[:, 6:12], takes[:, 6:12], cache=cache, lengths=[6, 3, 5])
    run(inside, hidden[:, 12:15], takes[:, 12:15], cache=cache)
    rows = [[column for column in each if column < 15 - removed] for each in (
        list(range(15)), [*range(9), 12, 13, 14], [*range(11), 12, 13, 14])]  # fmt: skip
    fed = [(hidden[row, kept], takes[row, kept]) for row, kept in enumerate(rows)]
    cache.crop(-removed)
    for order, begin, taken_back in (([2, 0, 1], 20, 3), ([1, 1, 2], 24, 0)):
        new = slice(begin, begin + 5)
        output = run(inside, hidden[:, new], takes[:, new], cache=cache)
        for row in range(3):
            fed[row] = tuple(
                torch.cat([old, each[row, new]]) for old, each in zip(fed[row], (hidden, takes), strict=True)
            )
            assert_close(output[row], alone(inside, *fed[row])[-5:], **EXACT)
        cache.reorder_cache(torch.tensor(order))
        cache.crop(-taken_back)
        fed = [tuple(each[: len(each) - taken_back] for each in fed[row]) for row in order]
    with pytest.raises(ValueError, match="not recorded"):
        cache.crop(-1)  # what was recorded is forgotten at every crop


def test_crop_is_refused_where_nothing_was_recorded(inside):
    hidden, takes = tokens(2, 6)
    cache = MMaDACache(1)
    run(inside, hidden, takes, cache=cache)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)
    assert cache.columns == 6


def test_bytes_rows_and_reset_count_the_parts_inside(inside):
    hidden, takes = tokens(2, 6)
    cache = MMaDACache(1)
    run(inside, hidden, torch.ones_like(takes), cache=cache)
    key_values, slots, counts = 2 * 2 * 6 * WIDTH * 8, 2 * 2 * 3 * WIDTH * 8, 2 * 8
    assert cache.num_bytes() == key_values + slots + counts
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.batch_size == 1 and cache.num_bytes() == (key_values + slots + counts) // 2
    cache.reset()
    assert cache.num_bytes() == 0
