"""The recall task: rows that can be answered, and only by remembering."""

import pytest
import torch

from mmada.data.recall import RecallTask


def test_every_question_is_answered_by_its_pair():
    task = RecallTask(num_pairs=5, length=30, num_symbols=7, first_id=10)
    batch = task.batch(seed=1, step=2, rows=9)
    assert batch["input_ids"].shape == (9, 30) and batch["input_ids"].max() == task.vocab_size - 1
    first_question, first_value = 10 + 7 * 7, 10 + 7 * 8
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["shift_labels"].tolist(), strict=True):
        told = dict(divmod(token - 10, 7) for token in tokens[:5])
        assert len(told) == 5
        assert set(tokens[5:25]) == {task.vocab_size - 1} and set(labels[:25]) == {-100}
        for token, label in zip(tokens[25:], labels[25:], strict=True):
            assert told[token - first_question] == label - first_value


def test_rows_are_a_function_of_seed_and_step():
    task = RecallTask(num_pairs=4, length=32)
    same = [task.batch(3, 4, 2)["input_ids"] for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], task.batch(3, 5, 2)["input_ids"])
    assert not torch.equal(same[0], task.batch(4, 4, 2)["input_ids"])


@pytest.mark.parametrize(("pairs", "length"), [(0, 32), (13, 999), (9, 17)])
def test_a_row_without_room_is_refused(pairs, length):
    with pytest.raises(ValueError, match=f"(num_pairs={pairs}|length={length})"):
        RecallTask(num_pairs=pairs, length=length)
