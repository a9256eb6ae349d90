"""Advantages against other libraries' code, golden numbers and the sums written out."""

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from mmada.training.advantages import explained_variance, gae, gae_reference, group_advantages, whiten

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def ragged(lengths: list[int], num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, values and mask, in float64; what stands behind a row's tokens is not a number."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), num_tokens)
    mask_BT = torch.arange(num_tokens) < torch.tensor(lengths)[:, None]
    rewards_BT, values_BT = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards_BT.masked_fill(~mask_BT, torch.nan), values_BT.masked_fill(~mask_BT, torch.nan), mask_BT


def test_gae_gives_the_golden_numbers():
    rewards_BT, values_BT = torch.tensor([[0.0, 0, 1]]).double(), torch.tensor([[0.5, 0.4, 0.3]]).double()
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, torch.ones(1, 3), gamma=0.99, gae_lambda=0.95)
    assert torch.allclose(advantages_BT, torch.tensor([[0.418307, 0.555350, 0.7]]).double(), atol=1e-6)
    assert torch.allclose(returns_BT, torch.tensor([[0.918307, 0.955350, 1.0]]).double(), atol=1e-6)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.99, 0.9), (0.9, 0.0), (1.0, 1.0)])
def test_gae_of_ragged_rows_is_the_sum_written_out_and_a_linear_filter(gamma: float, gae_lambda: float):
    lengths = [1, 63, 100, 40, 0]
    rewards_BT, values_BT, mask_BT = ragged(lengths, 100)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma, gae_lambda)
    expected_BT, expected_returns_BT = gae_reference(
        rewards_BT.nan_to_num(), values_BT.nan_to_num(), mask_BT, gamma, gae_lambda
    )
    torch.testing.assert_close(advantages_BT, expected_BT, **EXACT)
    torch.testing.assert_close(returns_BT, expected_returns_BT, **EXACT)
    for b, length in enumerate(lengths):
        value = values_BT[b, :length].numpy()
        delta = rewards_BT[b, :length].numpy() + gamma * np.append(value[1:], 0.0)[:length] - value
        filtered = lfilter([1.0], [1.0, -gamma * gae_lambda], delta[::-1])[::-1] if length else delta
        np.testing.assert_allclose(advantages_BT[b, :length].numpy(), filtered, rtol=1e-12, atol=1e-12)
        assert not advantages_BT[b, length:].any() and not returns_BT[b, length:].any()


def test_gae_is_stable_baselines3s_over_the_rows_joined():
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    lengths = [7, 1, 12]
    rewards_BT, values_BT, mask_BT = ragged(lengths, 12)
    space = spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(sum(lengths), space, space, gae_lambda=0.9, gamma=0.97)
    buffer.rewards[:, 0], buffer.values[:, 0] = rewards_BT[mask_BT].numpy(), values_BT[mask_BT].numpy()
    buffer.episode_starts[[0, 7, 8], 0] = 1
    buffer.compute_returns_and_advantage(last_values=torch.tensor([5.0]), dones=np.array([True]))
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=0.97, gae_lambda=0.9)
    np.testing.assert_allclose(advantages_BT[mask_BT].numpy(), buffer.advantages[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns_BT[mask_BT].numpy(), buffer.returns[:, 0], rtol=1e-4, atol=1e-5)


def test_gae_is_torchrls():
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    lengths = [9, 4, 1]
    rewards_BT, values_BT, mask_BT = ragged(lengths, 9)
    done_BT1 = (torch.arange(9) == torch.tensor(lengths)[:, None] - 1)[..., None]
    value_BT1, reward_BT1 = values_BT.nan_to_num()[..., None], rewards_BT.nan_to_num()[..., None]
    next_BT1 = torch.cat([value_BT1[:, 1:], torch.full((3, 1, 1), 4.0)], dim=1)
    gamma, gae_lambda = torch.tensor([0.98, 0.93], dtype=torch.float64)  # as numbers they become float32 there
    expected = generalized_advantage_estimate(gamma, gae_lambda, value_BT1, next_BT1, reward_BT1, done_BT1, done_BT1)
    for ours_BT, theirs_BT1 in zip(gae(rewards_BT, values_BT, mask_BT, 0.98, 0.93), expected, strict=True):
        torch.testing.assert_close(ours_BT[mask_BT], theirs_BT1[..., 0][mask_BT], rtol=1e-9, atol=1e-9)


def test_whitening_gives_the_golden_numbers_whatever_stands_behind_a_row():
    x_BT = torch.tensor([[0.418307, 0.555350, torch.nan], [0.7, torch.nan, torch.nan]]).double()
    mask_BT = ~x_BT.isnan()
    for unbiased, expected in ((True, (-0.990878, -0.018, 1.008878)), (False, (-1.213573, -0.022045, 1.235618))):
        whitened_BT = whiten(x_BT, mask_BT, unbiased=unbiased)
        assert torch.allclose(whitened_BT[mask_BT], torch.tensor(expected).double(), atol=1e-5)
        assert not whitened_BT[~mask_BT].any()
    kept_N = whiten(x_BT, mask_BT, shift_mean=False)[mask_BT]
    assert kept_N.mean().item() == pytest.approx(x_BT[mask_BT].mean().item(), abs=1e-12)
    assert kept_N.std().item() == pytest.approx(1, abs=1e-5)


def test_group_advantages_give_the_golden_numbers():
    scores_N = torch.tensor([2.5, 0, 0.5, 2]).double()
    unbiased = group_advantages(scores_N, 4, "grpo")
    assert torch.allclose(
        unbiased.advantages_N, torch.tensor([1.050122, -1.050122, -0.630073, 0.630073]).double(), atol=1e-6
    )
    population_N = group_advantages(scores_N, 4, "grpo", unbiased=False, epsilon=0).advantages_N
    assert torch.allclose(population_N, torch.tensor([1.212678, -1.212678, -0.727607, 0.727607]).double(), atol=1e-6)
    assert (unbiased.num_groups, unbiased.num_single, unbiased.num_zero_std) == (1, 0, 0)


def test_groups_that_lost_members_are_compared_among_what_is_left():
    scores_N = torch.tensor([1.0, 7, 0, 0.1, 1, 0.1, 0.1, 3]).double()
    groups_N = torch.tensor([5, 2, 5, 9, 5, 9, 9, 2])
    fives, twos, nines = [0, 2, 4], [1, 7], [3, 5, 6]  # the nines are all alike, and 0.1 · 3 / 3 is not 0.1
    for kind in ("grpo", "dr_grpo", "rloo"):
        found = group_advantages(scores_N, groups_N, kind)
        for members in (fives, twos):
            for i in members:
                others = scores_N[[j for j in members if j != i]]
                mean, std = scores_N[members].mean(), scores_N[members].std()
                expected = {
                    "grpo": (scores_N[i] - mean) / (std + 1e-4),
                    "dr_grpo": scores_N[i] - mean,
                    "rloo": scores_N[i] - others.mean(),
                }[kind]
                assert found.advantages_N[i].item() == pytest.approx(expected.item(), abs=1e-12)
        assert found.advantages_N[nines].tolist() == [0, 0, 0]
        assert (found.num_groups, found.num_single, found.num_zero_std) == (3, 0, 1)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_group_of_one_says_nothing_and_is_counted(kind: str):
    found = group_advantages(torch.tensor([3.0, 1, 2]), torch.tensor([1, 0, 0]), kind)
    assert found.advantages_N[0] == 0 and found.advantages_N[1] == -found.advantages_N[2] != 0
    assert (found.num_groups, found.num_single, found.num_zero_std) == (2, 1, 0)


def test_scores_that_fit_no_groups_are_refused():
    with pytest.raises(ValueError, match="5 scores are no whole groups of 2"):
        group_advantages(torch.zeros(5), 2, "grpo")
    with pytest.raises(ValueError, match="5 scores have 1 group ids"):
        group_advantages(torch.zeros(5), torch.zeros(1, dtype=torch.int64), "grpo")


def test_explained_variance_is_stable_baselines3s():
    from stable_baselines3.common.utils import explained_variance as theirs

    returns_BT, values_BT, mask_BT = ragged([4, 9], 9)
    values_BT = returns_BT + 0.5 * values_BT
    expected = theirs(values_BT[mask_BT].numpy(), returns_BT[mask_BT].numpy())
    assert explained_variance(values_BT, returns_BT, mask_BT).item() == pytest.approx(expected, abs=1e-9)
    assert explained_variance(values_BT, torch.ones_like(values_BT), mask_BT).isnan()
