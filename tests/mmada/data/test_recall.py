"""The recall task: rows that can be answered, and only by remembering."""

import pytest
import torch

from mmada.data.recall import RecallTask


def test_every_question_is_answered_by_its_pair():
    task = RecallTask(num_pairs=5, length=40, num_symbols=16)
    batch = task.batch(seed=1, step=2, rows=7)
    assert batch["input_ids"].shape == (7, 40) and batch["input_ids"].max() < task.vocab_size
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["shift_labels"].tolist(), strict=True):
        told = dict(zip(tokens[0:10:2], tokens[1:10:2], strict=True))
        assert len(told) == 5
        assert len(set(tokens[10:30])) == 1
        for place in range(30, 40, 2):
            assert labels[place] == told[tokens[place]] == tokens[place + 1]
        assert [label for label in labels if label != -100] == [told[key] for key in tokens[30::2]]


def test_rows_are_a_function_of_seed_and_step():
    task = RecallTask(num_pairs=4, length=32)
    same = [task.batch(3, 4, 2)["input_ids"] for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], task.batch(3, 5, 2)["input_ids"])
    assert not torch.equal(same[0], task.batch(4, 4, 2)["input_ids"])


@pytest.mark.parametrize(("pairs", "length"), [(0, 32), (65, 999), (9, 35)])
def test_a_row_without_room_is_refused(pairs, length):
    with pytest.raises(ValueError, match=f"(num_pairs={pairs}|length={length})"):
        RecallTask(num_pairs=pairs, length=length)
