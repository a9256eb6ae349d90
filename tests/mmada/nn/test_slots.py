"""Slot memory against the formula of a Turing machine, its fast form against the loop, and its state in all uses."""

import math

import pytest
import torch
from torch.testing import assert_close

from mmada.config import MMaDAConfig
from mmada.nn.cache import MMaDACache
from mmada.nn.observing import collect_statistics
from mmada.nn.slots import (
    ChunkColumns,
    Commands,
    SlotMemory,
    WriteChunk,
    initial_state,
    slot_memory,
    slot_memory_reference,
)
from tests.mmada.nn.layers import make_context

WIDTH = 12
EXACT = {"rtol": 1e-6, "atol": 1e-9}


def make_config(chunk_size=4, allocation=False, slots=5):
    hybrid = {"memory_slots": slots, "memory_chunk_size": chunk_size, "slot_allocation": allocation}
    return MMaDAConfig(hidden_size=WIDTH, num_attention_heads=2, num_hidden_layers=1, hybrid=hybrid)


def make_memory(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    memory = SlotMemory(make_config(**settings), 0).to(dtype)
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return memory


def read(memory, hidden, *, cache=None, lengths=None, documents=None):
    context = make_context(memory.config, *hidden.shape[:2], cache=cache, lengths=lengths, documents=documents)
    output = memory(hidden, context, cache)
    if cache is not None:
        cache.advance(hidden.shape[1], context.valid_BT())
    return output


def tokens(batch, length, seed=1):
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_with_chunks_of_one_token_it_is_the_turing_machine():
    memory, hidden = make_memory(chunk_size=1), tokens(1, 7)
    slots, expected = memory.slots, []
    for h in hidden[0]:
        expected.append(torch.softmax(slots @ memory.q_proj(h) / math.sqrt(WIDTH), 0) @ slots)
        w = torch.softmax(slots @ memory.k_proj(h) / math.sqrt(WIDTH), 0)
        erase, add = torch.sigmoid(memory.erase_proj(h)), memory.add_proj(h)
        slots = slots * (1 - torch.outer(w, erase)) + torch.outer(w, add)
    assert_close(read(memory, hidden)[0], torch.stack(expected), **EXACT)


def test_a_chunk_reads_what_the_chunks_before_it_wrote_in_order():
    """Two numbers by hand: one slot, so every weight is 1, and width 1."""
    commands = Commands(*(torch.tensor(x, dtype=torch.float64).view(1, 4, 1) for x in (
        [0.0] * 4, [0.0] * 4, [0.5, 0.25, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0])), None)  # fmt: skip
    chunks = ChunkColumns(2, torch.arange(4)[None], torch.ones(1, 4, dtype=torch.bool), None, 4)
    initial = torch.tensor([[8.0]], dtype=torch.float64)
    reads, _, state = slot_memory(commands, chunks, initial, initial_state(initial, 1, False))
    # 8 → 8·½ + 1 = 5 → 5·¾ + 2 = 5.75 → 5.75 + 3 = 8.75 → 8.75·0 + 4 = 4
    assert reads.flatten().tolist() == [8.0, 8.0, 5.75, 5.75]
    assert state["slots"].item() == 4.0 and state["slots_at_start"].item() == 5.75


def test_allocation_takes_the_slots_used_least_one_after_the_other():
    """Allocation alone: the first chunk writes to slots 0, 1 and 2, the next to the untouched 3, then to the oldest."""
    zeros = torch.zeros(1, 6, 1, dtype=torch.float64)
    add = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 6, 1)
    commands = Commands(zeros, zeros, zeros + 1, add, zeros + 1)
    chunks = ChunkColumns(3, torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool), None, 6)
    initial = torch.zeros(4, 1, dtype=torch.float64)
    _, _, state = slot_memory(commands, chunks, initial, initial_state(initial, 1, True))
    assert state["slots"].flatten().tolist() == [5.0, 6.0, 3.0, 4.0]
    few = initial[:2]  # a chunk of more tokens than slots begins again: 0, 1, 0, then 1, 0, 1
    _, _, after = slot_memory(commands, chunks, few, initial_state(few, 1, True))
    assert after["slots"].flatten().tolist() == [5.0, 6.0]
    assert_close(state["usage"].flatten(), torch.tensor([0.95**5 + 0.95, 0.95**4 + 1, 0.95**3, 0.95**2]).double())


@pytest.mark.parametrize("allocation", [False, True])
@pytest.mark.parametrize("length", [1, 63, 100, 64])
@pytest.mark.parametrize("rows", ["alike", "ragged", "documents"])
def test_fast_equals_reference_by_value_and_gradient(length, allocation, rows):
    memory, hidden = make_memory(allocation=allocation), tokens(3, length)
    config, cache, documents, lengths = memory.config, None, None, None
    if rows == "ragged":
        lengths = [length, length // 2, 0]
        cache = MMaDACache(1)
        read(memory, tokens(3, 9, seed=2), cache=cache, lengths=[9, 2, 5])
    if rows == "documents":
        documents = torch.arange(length).div(17, rounding_mode="floor").repeat(3, 1)
    context = make_context(config, 3, length, cache=cache, lengths=lengths, documents=documents)
    chunks = ChunkColumns.of(context, 4)
    past = cache.layers[0].recurrent("slots").state if cache else initial_state(memory.slots, 3, allocation)
    past = {name: tensor.detach().clone() for name, tensor in past.items()}
    results = []
    for scan in (slot_memory_reference, slot_memory):
        state = {name: t.clone().requires_grad_(name.startswith("slots")) for name, t in past.items()}
        own, initial = hidden.clone().requires_grad_(), memory.slots.detach().clone().requires_grad_()
        allocate = memory.allocation_proj(own).sigmoid() if allocation else None
        commands = Commands(memory.q_proj(own), memory.k_proj(own), own.sigmoid(), memory.add_proj(own), allocate)
        reads, weights, after = scan(commands, chunks, initial, state)
        valid = chunks.valid_BT[..., None]
        values = [reads * valid, weights * valid, *after.values()]
        torch.manual_seed(3)
        sum((value * torch.randn_like(value)).sum() for value in values).backward()
        results.append(values + [own.grad, initial.grad, state["slots"].grad, state["slots_at_start"].grad])
    for reference, fast in zip(*results, strict=True):
        assert_close(fast, reference, **EXACT)


def test_writing_a_chunk_has_the_gradients_of_its_formula():
    torch.manual_seed(0)
    shapes = [(2, 3, 4), (2, 5, 3), (2, 5, 4), (2, 5, 4)]
    inputs = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(WriteChunk.apply, inputs)


@pytest.mark.parametrize("allocation", [False, True])
def test_decoding_in_pieces_of_ragged_rows_equals_single_rows_at_once(allocation):
    memory, hidden = make_memory(allocation=allocation), tokens(3, 30)
    pieces = [[5, 0, 1], [1, 1, 1], [1, 1, 1], [0, 9, 4], [3, 2, 7], [1, 1, 1]]
    cache, seen, outputs = MMaDACache(1), [0, 0, 0], [[], [], []]
    for lengths in pieces:
        new = torch.full((3, max(lengths), WIDTH), 9.0, dtype=torch.float64)
        for row, length in enumerate(lengths):
            new[row, :length] = hidden[row, seen[row] : seen[row] + length]
        output = read(memory, new, cache=cache, lengths=lengths)
        for row, length in enumerate(lengths):
            outputs[row].append(output[row, :length])
            seen[row] += length
    for row in range(3):
        alone = read(memory, hidden[row : row + 1, : seen[row]])
        assert_close(torch.cat(outputs[row]), alone[0], **EXACT)


def test_documents_do_not_see_each_other():
    memory, a, b = make_memory(allocation=True), tokens(1, 6), tokens(1, 9, seed=2)
    packed = read(memory, torch.cat([a, b], dim=1), documents=torch.tensor([[0] * 6 + [1] * 9]))
    assert_close(packed, torch.cat([read(memory, a), read(memory, b)], dim=1), **EXACT)


def test_reordered_selected_and_cropped_rows_go_on_as_if_fed_alone():
    memory, hidden, more = make_memory(allocation=True), tokens(3, 11), tokens(2, 6, seed=2)
    cache = MMaDACache(1)
    cache.activate_past_recording()
    read(memory, hidden[:, :6], cache=cache)
    cache.crop(0)
    read(memory, hidden[:, 6:], cache=cache)
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    after = read(memory, more, cache=cache)
    assert_close(after, read(memory, torch.cat([hidden[[2, 0], :8], more], dim=1))[:, 8:], **EXACT)


def test_a_token_changes_nothing_before_it_nor_in_its_own_chunk_and_something_after_it():
    memory, hidden = make_memory(), tokens(1, 15)
    changed = hidden.clone()
    changed[0, 9] += 1
    before, after = read(memory, hidden), read(memory, changed)
    same = (before == after).all(-1)[0].tolist()
    assert same == [True] * 9 + [False] + [True] * 2 + [False] * 3


@pytest.mark.parametrize("length", [3, 12])
def test_every_parameter_has_a_gradient_in_training_and_none_is_idle_beyond_a_chunk(length):
    memory = make_memory(allocation=True).train()
    read(memory, tokens(2, length)).sum().backward()
    gradients = {name: p.grad for name, p in memory.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    idle = {name for name, gradient in gradients.items() if gradient.abs().max() == 0}
    writing = {"k_proj.weight", "erase_proj.weight", "erase_proj.bias", "add_proj.weight"}
    writing |= {"allocation_proj.weight", "allocation_proj.bias"}
    assert idle == (set() if length > 4 else writing)


def test_in_bfloat16_the_slots_stay_in_float32():
    memory, cache = make_memory(dtype=torch.bfloat16), MMaDACache(1)
    output = read(memory, tokens(2, 9).bfloat16(), cache=cache)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    assert cache.layers[0].recurrent("slots").state["slots"].dtype == torch.float32


def test_statistics_count_slots_in_use():
    memory = make_memory(slots=4)
    with torch.no_grad():
        memory.q_proj.weight.copy_(20 * torch.eye(WIDTH))
        memory.slots.copy_(20 * torch.eye(WIDTH)[:4])
    hidden = torch.eye(WIDTH, dtype=torch.float64)[:2][None]  # the two tokens read slots 0 and 1 and nothing else
    with collect_statistics(memory) as statistics:
        read(memory, torch.cat([hidden, 5 + hidden], dim=1), lengths=[2])
    assert statistics.summary()[""] == pytest.approx({"slot_usage": 0.5, "effective_slots": 2.0})
