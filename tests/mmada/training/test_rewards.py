"""Rewards that are no rewards: each is found, none is passed on or spread over a batch."""

import numpy as np
import pytest
import torch

from mmada.training.rewards import RewardCallError, RewardResult, check_values


@pytest.mark.parametrize(
    "values", [[1, 0.5], (1, 0.5), np.array([1, 0.5]), torch.tensor([1, 0.5]), [torch.tensor(1), np.float32(0.5)]]
)
def test_a_number_for_each_sample_is_a_result(values: object):
    results = check_values(values, 2, "mine")
    assert [result.value for result in results] == [1.0, 0.5] and all(type(result.value) is float for result in results)
    assert all(result.error is None for result in results)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (0.5, "mine gave float 0.5 for 3 samples"),
        (torch.tensor(0.5), "mine gave Tensor tensor"),
        (np.float64(0.5), "mine gave float64"),
        ("abc", "mine gave str 'abc'"),
        (None, "mine gave None for 3 samples"),
        ({"a": 1, "b": 2, "c": 3}, "mine gave dict"),
        ([1.0, 2.0], "mine gave 2 numbers for 3 samples"),
        ([0.5], "mine gave 1 numbers for 3 samples"),
        ((x for x in (1, 2, 3)), "mine gave generator"),
    ],
)
def test_anything_but_one_entry_per_sample_fails_the_whole_call(values: object, message: str):
    with pytest.raises(RewardCallError, match=message):
        check_values(values, 3, "mine")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (float("nan"), "gave nan"),
        (float("-inf"), "gave -inf"),
        (np.float32("nan"), "gave nan"),
        (1e39, "gave 1e+39; a reward is at most 1e+09 in magnitude"),  # finite, and infinite in float32
        (-(10**400), "gave inf"),
        (None, "gave None"),
        (True, "gave bool True"),
        (np.True_, "gave bool True"),
        ("1.0", "gave str '1.0'"),
        ([1.0], "gave list"),
        (1j, "gave complex"),
    ],
)
def test_an_entry_that_is_no_finite_number_fails_its_sample_alone(bad: object, message: str):
    first, second, third = check_values([1.0, bad, 3.0], 3, "mine")
    assert (first.value, second.value, third.value) == (1.0, None, 3.0)
    assert second.error is not None and second.error.startswith(f"mine {message}") and "\n" not in second.error


def test_a_result_has_a_value_or_an_error():
    for value, error in ((None, None), (1.0, "late")):
        with pytest.raises(ValueError, match="exactly one"):
            RewardResult(value, error)
