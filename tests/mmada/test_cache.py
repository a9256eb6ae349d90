"""The cache itself: what it keeps, how it is reordered, cut back and measured."""

import copy
import io

import pytest
import torch
from torch.testing import assert_close

from mmada.nn.cache import KeyValues, MMaDACache, Recurrent
from mmada.nn.context import Context


def context_of(batch, length, *, past=0, lengths=None):
    """``past`` is a number, or one per row."""
    past_B = None if isinstance(past, int) else torch.tensor(past)
    return Context(
        shape=(batch, length),
        device=torch.device("cpu"),
        position_ids_BT=torch.zeros(batch, length, dtype=torch.long),
        lengths_B=None if lengths is None else torch.tensor(lengths),
        past=past if past_B is None else max(past),
        past_B=past_B,
    )


def numbered(batch, first, length):
    """Keys (batch, 1, length, 1) that say row and number of their token: 100·row + number."""
    return (100.0 * torch.arange(batch)[:, None] + torch.arange(first, first + length))[:, None, :, None]


def running_sum(hidden_BTD, state, context):
    """A recurrence that tests can follow: the sum of all real inputs, and how many there were."""
    batch, length, width = hidden_BTD.shape
    if state is None:
        state = {"sum": hidden_BTD.new_zeros(batch, width), "count": torch.zeros(batch, dtype=torch.long)}
    valid_BT = context.valid_BT()
    valid_BT = torch.ones(batch, length, dtype=torch.bool) if valid_BT is None else valid_BT
    sums_BTD = state["sum"][:, None] + (hidden_BTD * valid_BT[..., None]).cumsum(dim=1)
    return sums_BTD, {"sum": sums_BTD[:, -1], "count": state["count"] + valid_BT.sum(dim=1)}


class TestKeyValues:
    def test_grows_by_what_is_appended(self):
        part = KeyValues()
        first = part.append(numbered(2, 0, 3), -numbered(2, 0, 3), context_of(2, 3))
        assert first[2] == 0 and torch.equal(first[0], numbered(2, 0, 3))
        keys, values, offset = part.append(numbered(2, 3, 1), -numbered(2, 3, 1), context_of(2, 1, past=3))
        assert offset == 0
        assert torch.equal(keys, numbered(2, 0, 4)) and torch.equal(values, -keys)

    def test_a_window_is_seen_whole_by_a_chunk_and_then_rolls(self):
        part = KeyValues(window=3)
        keys, _, offset = part.append(numbered(1, 0, 5), numbered(1, 0, 5), context_of(1, 5))
        assert (keys.flatten().tolist(), offset) == ([0, 1, 2, 3, 4], 0)
        assert (part.keys.flatten().tolist(), part.offset) == ([2, 3, 4], 2)
        keys, _, offset = part.append(numbered(1, 5, 2), numbered(1, 5, 2), context_of(1, 2, past=5))
        assert (keys.flatten().tolist(), offset) == ([2, 3, 4, 5, 6], 2)
        assert (part.keys.flatten().tolist(), part.offset) == ([4, 5, 6], 4)
        assert part.keys.untyped_storage().nbytes() == 3 * 4  # nothing older hides behind it

    def test_ragged_rows_are_joined_without_gaps(self):
        part = KeyValues()
        part.append(numbered(2, 0, 4), numbered(2, 0, 4), context_of(2, 4, lengths=[4, 2]))
        new = torch.tensor([[4.0, 999], [102, 103]])[:, None, :, None]
        keys, _, _ = part.append(new, new, context_of(2, 2, past=[4, 2], lengths=[1, 2]))
        assert keys[0].flatten().tolist() == [0, 1, 2, 3, 4]
        assert keys[1, 0, :4].flatten().tolist() == [100, 101, 102, 103]

    def test_a_window_of_ragged_rows_keeps_what_the_shortest_needs(self):
        part = KeyValues(window=2)
        part.append(numbered(2, 0, 6), numbered(2, 0, 6), context_of(2, 6, lengths=[6, 3]))
        assert part.offset == 1
        assert part.keys[0].flatten().tolist() == [1, 2, 3, 4, 5]
        assert part.keys[1, 0, :2].flatten().tolist() == [101, 102]

    def test_what_was_recorded_behind_a_window_can_be_taken_back(self):
        part = KeyValues(window=2)
        part.append(numbered(1, 0, 4), numbered(1, 0, 4), context_of(1, 4))
        part.recording = True
        part.append(numbered(1, 4, 3), numbered(1, 4, 3), context_of(1, 3, past=4))
        assert part.keys.flatten().tolist() == [2, 3, 4, 5, 6]
        part.crop(totals=5, removed=2)
        part.crop(totals=4, removed=1)
        keys, _, offset = part.append(numbered(1, 4, 1), numbered(1, 4, 1), context_of(1, 1, past=4))
        assert (keys.flatten().tolist(), offset) == ([2, 3, 4], 2)
        part.crop(totals=5, removed=0)
        keys, _, offset = part.append(numbered(1, 5, 1), numbered(1, 5, 1), context_of(1, 1, past=5))
        assert (keys.flatten().tolist(), offset) == ([3, 4, 5], 3)  # the window has moved on

    @pytest.mark.parametrize("recording", [False, True])
    def test_what_a_window_let_go_cannot_come_back(self, recording):
        part = KeyValues(window=2)
        part.append(numbered(1, 0, 4), numbered(1, 0, 4), context_of(1, 4))
        part.recording = recording  # too late
        part.check_crop(totals=4, removed=0)
        with pytest.raises(ValueError, match=r"crop\(-1\).*window of 2.*activate_past_recording"):
            part.check_crop(totals=3, removed=1)


class TestRecurrent:
    def fed(self, inputs, *, recording=True):
        part, number = Recurrent(), 0
        part.recording = recording
        for length in inputs:
            part.run(running_sum, numbered(1, number, length)[:, 0], context_of(1, length, past=number))
            number += length
        return part, number

    def test_carries_its_state_from_call_to_call(self):
        part, _ = self.fed([3, 1, 4], recording=False)
        assert part.state["sum"].item() == sum(range(8)) and part.state["count"].item() == 8
        assert len(part.tensors()) == 2  # nothing else is kept

    @pytest.mark.parametrize("calls", [[9], [4, 5], [40, 1, 1, 1], [1] * 40, [3, 20, 2, 17]])
    @pytest.mark.parametrize("removed", [1, 2, 3, 9])
    def test_takes_tokens_back_and_goes_on(self, calls, removed):
        part, number = self.fed(calls)
        number -= removed
        part.crop(number, removed)
        output = part.run(running_sum, numbered(1, number, 1)[:, 0], context_of(1, 1, past=number))
        assert output.item() == sum(range(number + 1))
        assert part.state["count"].item() == number + 1

    def test_a_long_prompt_is_not_run_again(self):
        part, _ = self.fed([50, 1, 1, 1])
        part.crop(51, 2)
        seen = []

        def scan(hidden, state, context):
            seen.append((hidden.shape[1], context.past))
            return running_sum(hidden, state, context)

        part.run(scan, numbered(1, 51, 1)[:, 0], context_of(1, 1, past=51))
        assert seen == [(1, 50), (1, 51)]

    def test_can_be_cut_twice_and_cut_again_after_going_on(self):
        part, _ = self.fed([6])
        part.crop(5, 1)
        part.crop(3, 2)
        part.run(running_sum, numbered(1, 3, 2)[:, 0], context_of(1, 2, past=3))
        part.crop(4, 1)
        output = part.run(running_sum, numbered(1, 4, 1)[:, 0], context_of(1, 1, past=4))
        assert output.item() == sum(range(5))

    def test_everything_can_be_taken_back(self):
        part, _ = self.fed([2, 2])
        part.crop(0, 4)
        assert part.tensors() == []
        assert part.run(running_sum, torch.full((1, 1, 1), 5.0), context_of(1, 1)).item() == 5

    def test_rows_may_differ_in_what_is_taken_back(self):
        part = Recurrent()
        part.recording = True
        part.run(running_sum, numbered(2, 0, 4)[:, 0], context_of(2, 4, lengths=[4, 3]))
        part.run(
            running_sum, torch.tensor([[[4.0], [0]], [[103], [104]]]), context_of(2, 2, past=[4, 3], lengths=[1, 2])
        )
        part.crop(torch.tensor([4, 2]), torch.tensor([1, 3]))
        output = part.run(running_sum, torch.tensor([[[4.0]], [[102.0]]]), context_of(2, 1, past=[4, 2]))
        assert output.flatten().tolist() == [0 + 1 + 2 + 3 + 4, 100 + 101 + 102]

    def test_refuses_what_was_not_recorded(self):
        part, _ = self.fed([4], recording=False)
        with pytest.raises(ValueError, match=r"crop\(-1\).*activate_past_recording"):
            part.check_crop(3, 1)
        part.recording = True
        part.run(running_sum, numbered(1, 4, 1)[:, 0], context_of(1, 1, past=4))
        with pytest.raises(ValueError, match=r"crop\(-2\).*not recorded"):
            part.check_crop(3, 2)

    def test_crop_of_nothing_forgets_the_recording(self):
        part, _ = self.fed([4])
        part.crop(4, 0)
        assert len(part.tensors()) == 2
        with pytest.raises(ValueError, match="not recorded"):
            part.check_crop(3, 1)

    def test_long_recordings_keep_few_states(self):
        part, _ = self.fed([1] * 64)
        states = {id(span.before) for span in part._spans}
        assert len(states) == 64 / Recurrent.span_size

    def test_rows_are_changed_with_all_that_is_recorded(self):
        part = Recurrent()
        part.recording = True
        for number in range(3):
            part.run(running_sum, numbered(2, number, 1)[:, 0], context_of(2, 1, past=number))
        part.map(lambda tensor: tensor.flip(0))
        part.crop(2, 1)
        output = part.run(running_sum, numbered(2, 2, 1)[:, 0].flip(0), context_of(2, 1, past=2))
        assert output.flatten().tolist() == [100 + 101 + 102, 0 + 1 + 2]


def fed_cache(batch=2, valid=None, length=4, window=3):
    """Two layers: a window of keys, and a sum."""
    cache = MMaDACache(2)
    lengths = None if valid is None else valid.sum(dim=1).tolist()
    context = context_of(batch, length, lengths=lengths)
    cache.layers[0].key_values(window=window).append(numbered(batch, 0, length), numbered(batch, 0, length), context)
    cache.layers[1].recurrent("sum").run(running_sum, numbered(batch, 0, length)[:, 0], context)
    cache.advance(length, valid)
    return cache


class TestMMaDACache:
    def test_says_how_much_it_holds(self):
        cache = MMaDACache(2)
        assert (cache.get_seq_length(), cache.batch_size, cache.num_bytes(), len(cache)) == (0, -1, 0, 2)
        assert not cache.is_initialized and not cache.is_compileable
        cache = fed_cache()
        assert (cache.get_seq_length(), cache.get_seq_length(1), cache.batch_size) == (4, 4, 2)
        assert cache.get_max_length() == -1 and cache.get_mask_sizes(3, 0) == (7, 0) and cache.get_query_offset() == 4
        assert cache.is_initialized and cache.is_sliding == [False, False]
        # two rows: three keys and three values, a sum of one float and a count of one integer
        assert cache.num_bytes() == 2 * (6 * 4 + 4 + 8)
        cache.early_initialization(2, 1, 1, torch.float32, torch.device("cpu"))  # has nothing to do

    def test_knows_the_real_tokens_of_padded_rows(self):
        valid = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
        cache = fed_cache(valid=valid)
        assert cache.lengths_B.tolist() == [4, 2] and cache.get_seq_length() == 4
        cache.advance(1, None)
        assert cache.lengths_B.tolist() == [5, 3]
        later = fed_cache()
        later.advance(2, valid[:, 1:3])  # padding that comes after columns without any
        assert later.lengths_B.tolist() == [6, 5]

    def test_rows_are_reordered_repeated_and_selected_together(self):
        cache = fed_cache(valid=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool))
        cache.reorder_cache(torch.tensor([1, 0]))
        assert cache.lengths_B.tolist() == [2, 4]
        assert cache.layers[1].recurrent("sum").state["count"].tolist() == [2, 4]
        assert cache.layers[0].key_values().keys[1, 0, -1].item() == 3
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4 and cache.lengths_B.tolist() == [2, 2, 4, 4]
        cache.batch_select_indices(torch.tensor([3, 0]))
        assert cache.layers[1].recurrent("sum").state["count"].tolist() == [4, 2]
        cache.batch_select_indices(torch.tensor([False, True]))
        assert cache.batch_size == 1 and cache.lengths_B.tolist() == [2]

    def test_an_empty_cache_takes_every_operation(self):
        cache = MMaDACache(1)
        cache.reorder_cache(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0]))
        cache.crop(0)
        cache.reset()
        assert cache.get_seq_length() == 0

    def test_crop_counts_columns_and_takes_back_real_tokens(self):
        cache = MMaDACache(1)
        cache.activate_past_recording()
        assert cache.is_croppable and cache.is_recording_past(0)
        valid = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
        part = cache.layers[0].recurrent("sum")
        part.run(running_sum, numbered(2, 0, 4)[:, 0], context_of(2, 4, lengths=[3, 1]))
        cache.advance(4, valid)
        cache.crop(-2)
        assert cache.get_seq_length() == 2 and cache.lengths_B.tolist() == [1, 0]
        output = part.run(running_sum, torch.ones(2, 1, 1), context_of(2, 1, past=[1, 0]))
        assert output.flatten().tolist() == [0 + 1, 1]

    @pytest.mark.parametrize(("remove", "message"), [(1, r"crop\(1\) is positive"), (-5, "removes more than the 4")])
    def test_crop_refuses_what_makes_no_sense(self, remove, message):
        with pytest.raises(ValueError, match=message):
            fed_cache().crop(remove)

    def test_a_refused_crop_changes_nothing(self):
        cache = fed_cache()
        before = [tensor.clone() for layer in cache.layers for tensor in layer.tensors()]
        with pytest.raises(ValueError, match="activate_past_recording"):
            cache.crop(-1)
        assert cache.get_seq_length() == 4
        for kept, was in zip([t for layer in cache.layers for t in layer.tensors()], before, strict=True):
            assert torch.equal(kept, was)

    def test_reset_forgets_everything(self):
        cache = fed_cache(valid=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool))
        cache.reset()
        assert (cache.get_seq_length(), cache.num_bytes(), cache.lengths_B) == (0, 0, None)
        keys, _, offset = cache.layers[0].key_values().append(numbered(1, 0, 2), numbered(1, 0, 2), context_of(1, 2))
        assert (keys.shape[2], offset) == (2, 0)

    def test_copies_and_files_are_whole_and_apart(self):
        cache = fed_cache()
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        for twin in (copy.deepcopy(cache), torch.load(file, weights_only=False)):
            assert twin.get_seq_length() == 4
            assert_close([t for layer in twin.layers for t in layer.tensors()],
                         [t for layer in cache.layers for t in layer.tensors()])  # fmt: skip
            twin.layers[1].recurrent("sum").state["sum"].zero_()
            assert cache.layers[1].recurrent("sum").state["sum"].abs().min() > 0


def test_a_context_moves_to_another_device_once():
    context = context_of(2, 3, past=[1, 2], lengths=[3, 1])
    context.rotary = (torch.ones(2, 3, 4), torch.zeros(2, 3, 4))
    assert context.to("cpu") is context
    moved = context.to("meta", non_blocking=True)
    assert moved is context.to("meta") and moved.device.type == "meta"
    assert moved.lengths_B.device.type == moved.past_B.device.type == moved.rotary[1].device.type == "meta"
    assert (moved.shape, moved.past) == (context.shape, context.past)
