"""Batches of several sources: which rows, in which order, how often."""

import numpy as np
import pytest

from mmada.data.mixing import RowsOfSource, difficulty_shares, draw_batch
from mmada.data.sampling import global_batch_indices


def draw_many(steps, sources, weights, difficulty=(0.0, 1.0), batch=8, seed=3, drawn=None):
    drawn, draws = drawn or {}, []
    for step in steps:
        draw, drawn = draw_batch(seed, step, batch, sources, weights, difficulty, drawn)
        draws.append(draw)
    return draws, drawn


def test_one_source_with_everything_open_is_the_plain_order():
    draws, _ = draw_many(range(9), {"data": RowsOfSource(20)}, [1.0])
    for step, draw in enumerate(draws):
        assert draw.rows_B.tolist() == global_batch_indices(3, step, 8, 20).tolist()


def test_a_run_that_stops_and_goes_on_reads_the_same():
    sources = {"a": RowsOfSource(20), "b": RowsOfSource(33, difficulty_shares(np.arange(33.0)))}
    whole, end = draw_many(range(12), sources, [1, 2], (0.1, 0.7))
    first, middle = draw_many(range(5), sources, [1, 2], (0.1, 0.7))
    rest, again = draw_many(range(5, 12), sources, [1, 2], (0.1, 0.7), drawn=middle)
    assert again == end
    for one, other in zip(whole, [*first, *rest], strict=True):
        assert (one.rows_B == other.rows_B).all() and (one.sources_B == other.sources_B).all()


def test_weights_are_shares_and_a_weight_of_zero_is_never_drawn():
    sources = {"a": RowsOfSource(50), "b": RowsOfSource(50), "c": RowsOfSource(50)}
    draws, drawn = draw_many(range(500), sources, [1, 3, 0])
    count = np.bincount(np.concatenate([draw.sources_B for draw in draws]), minlength=3)
    assert count[2] == 0 and "c" not in drawn
    assert abs(count[0] / count.sum() - 0.25) < 4 * (0.25 * 0.75 / count.sum()) ** 0.5  # four standard deviations


def test_every_open_row_comes_once_in_an_epoch():
    shares = difficulty_shares(np.array([5.0, 1.0, 3.0, 2.0, 4.0, 0.0, 6.0, 7.0]))
    draws, drawn = draw_many(range(3), {"a": RowsOfSource(8, shares)}, [1], (0.0, 0.5), batch=4)
    assert sorted(draws[0].rows_B.tolist()) == sorted(draws[1].rows_B.tolist()) == [1, 2, 3, 5]  # the four easiest
    assert draws[0].rows_B.tolist() != draws[1].rows_B.tolist() or draws[1].rows_B.tolist() != draws[2].rows_B.tolist()


def test_rows_that_were_closed_come_when_they_open():
    shares = difficulty_shares(np.arange(10.0))
    sources = {"a": RowsOfSource(10, shares)}
    _, drawn = draw_many([0], sources, [1], (0.0, 0.3), batch=3)
    assert drawn == {"a": (0, drawn["a"][1])} or drawn["a"][0] == 1
    later, _ = draw_many(range(1, 8), sources, [1], (0.0, 1.0), batch=5, drawn=drawn)
    assert set(np.concatenate([draw.rows_B for draw in later]).tolist()) == set(range(10))


def test_a_range_between_two_rows_has_the_nearest():
    shares = difficulty_shares(np.arange(4.0))  # 0.125, 0.375, 0.625, 0.875
    draws, _ = draw_many([0], {"a": RowsOfSource(4, shares)}, [1], (0.0, 0.01), batch=3)
    assert draws[0].rows_B.tolist() == [0, 0, 0]


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 2.0], [0.0, 0.0]])
def test_weights_that_cannot_be(weights):
    with pytest.raises(ValueError, match="weights="):
        draw_batch(0, 0, 4, {"a": RowsOfSource(5), "b": RowsOfSource(5)}, weights, (0, 1), {})
