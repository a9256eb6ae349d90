"""The global batch as a pure function of (seed, step)."""

import itertools

import numpy as np
import pytest

from mmada.data import global_batch_indices, rank_slice, sample_ids


def _stream(seed: int, num_steps: int, global_batch: int, num_rows: int) -> np.ndarray:
    return np.concatenate([global_batch_indices(seed, step, global_batch, num_rows) for step in range(num_steps)])


@pytest.mark.parametrize(("global_batch", "num_rows"), [(8, 40), (7, 40), (64, 10), (1, 3), (5, 5), (3, 1)])
def test_every_row_once_per_epoch_whatever_the_batch(global_batch, num_rows):
    num_epochs = 6
    rows = _stream(3, -(-num_epochs * num_rows // global_batch), global_batch, num_rows)[: num_epochs * num_rows]
    for epoch in rows.reshape(num_epochs, num_rows):
        assert sorted(epoch.tolist()) == list(range(num_rows))


def test_the_sequence_of_rows_does_not_depend_on_the_batch_size():
    np.testing.assert_array_equal(_stream(0, 12, 5, 17), _stream(0, 5, 12, 17))
    np.testing.assert_array_equal(_stream(0, 12, 5, 17), _stream(0, 60, 1, 17))


def test_epochs_and_seeds_give_other_permutations():
    epochs = _stream(0, 5, 100, 100).reshape(5, 100)
    seeds = np.stack([global_batch_indices(seed, 0, 100, 100) for seed in range(5)])
    for orders in (epochs, seeds):
        for a, b in itertools.combinations(orders, 2):
            assert (a == b).sum() < 10
    # seed 0, epoch 1 is not seed 1, epoch 0
    assert (epochs[1] != seeds[1]).any()


def test_the_order_is_shuffled_well():
    order = global_batch_indices(0, 0, 20_000, 20_000)
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03


def test_golden_order():
    """A resumed run must see what the first one would have: this order may never change."""
    assert global_batch_indices(1234, 0, 10, 10).tolist() == [8, 9, 7, 3, 0, 1, 4, 2, 5, 6]
    assert global_batch_indices(1234, 2, 4, 10).tolist() == [5, 6, 0, 9]


def test_pure_whatever_was_asked_before():
    expected = global_batch_indices(5, 7, 9, 31).copy()
    for seed, step in itertools.product(range(4), range(30)):
        global_batch_indices(seed, step, 9, 31)
    got = global_batch_indices(5, 7, 9, 31)
    np.testing.assert_array_equal(got, expected)
    got[:] = -1  # the caller owns it
    np.testing.assert_array_equal(global_batch_indices(5, 7, 9, 31), expected)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_rank_slices_are_the_batch_in_order(world):
    indices = global_batch_indices(0, 4, 12, 50)
    slices = [rank_slice(indices, rank, world) for rank in range(world)]
    assert {len(part) for part in slices} == {12 // world}
    np.testing.assert_array_equal(np.concatenate(slices), indices)


def test_wrong_arguments_are_named():
    indices = np.arange(6)
    for call, message in [
        (lambda: rank_slice(indices, 0, 4), r"global_batch=6 is not divisible by world=4; use 4, 8 "),
        (lambda: rank_slice(indices, 0, 8), r"global_batch=6 is not divisible by world=8; use 8, "),
        (lambda: rank_slice(indices, 2, 2), r"rank=2 is outside 0\.\.1"),
        (lambda: global_batch_indices(0, 0, 0, 5), "global_batch=0 is too small; use 1 or more"),
        (lambda: global_batch_indices(0, 0, 5, 0), "num_rows=0 is too small"),
        (lambda: global_batch_indices(-1, 0, 5, 5), "seed=-1 is too small; use 0 or more"),
        (lambda: global_batch_indices(0, -1, 5, 5), "step=-1 is too small"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_rows_of_other_seeds_and_steps_have_other_names():
    """Also where the seed is as large as a recipe allows."""
    names = [sample_ids(seed, step, 16) for seed in (0, 7, 2**32 - 1) for step in (0, 1, 10_000)]
    assert len(set(np.concatenate(names).tolist())) == 9 * 16
    assert sample_ids(7, 3, 16).tolist() == [*sample_ids(7, 6, 8), *sample_ids(7, 7, 8)]  # a row keeps its name
