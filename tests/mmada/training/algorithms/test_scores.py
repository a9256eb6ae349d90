"""How scores become advantages, algorithm by algorithm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmada.training.advantages import gae
from mmada.training.algorithms import ALGORITHMS, AdvantageSettings, ScoredBatch

MASK_BT = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
LOGPROBS_BT = torch.tensor([[-1.0, -2, -3], [-1, -1, 9], [-2, 9, 9], [-1, -1, -1]]).double()
REFERENCE_BT = torch.tensor([[-2.0, -2, -2], [-3, -1, 5], [-2, 5, 5], [-1, -2, -4]]).double()
BATCH = ScoredBatch(
    scores_B=torch.tensor([1.0, 0, 3, 2]).double(),
    mask_BT=MASK_BT,
    logprobs_BT=LOGPROBS_BT,
    reference_logprobs_BT=REFERENCE_BT,
    values_BT=torch.tensor([[0.5, 0.25, 0.1], [0.1, 0.2, 9], [1, 9, 9], [0, 0, 1]]).double(),
    groups_B=torch.tensor([0, 1, 0, 1]),
    finished_B=torch.tensor([True, True, False, True]),
)
SETTINGS = AdvantageSettings(gamma=0.9, gae_lambda=0.8, missing_end_penalty=0.5)
SCORES_B = torch.tensor([1.0, 0, 2.5, 2]).double()  # with the penalty
KL_B = torch.tensor([1.0 + 0 - 1, 2 + 0, 0, 0 + 1 + 3]).double()  # log π - log π_ref, summed


def test_ppo_pays_each_tokens_divergence_where_it_falls():
    found = ALGORITHMS["ppo"].advantages(BATCH, SETTINGS, 0.1)
    rewards_BT = torch.tensor([[-0.1, 0, 0.1 + 1], [-0.2, 0, 0], [2.5, 0, 0], [0, -0.1, -0.3 + 2]]).double()
    expected_BT, expected_returns_BT = gae(rewards_BT, BATCH.values_BT, MASK_BT, 0.9, 0.8)
    torch.testing.assert_close(found.advantages_BT, expected_BT)
    torch.testing.assert_close(found.returns_BT, expected_returns_BT)
    torch.testing.assert_close(found.kl_B, KL_B)


def test_ppo_whitens_rewards_without_moving_their_mean():
    def mean_reward(whiten_rewards: bool) -> tuple[float, float]:
        settings = replace(SETTINGS, whiten_rewards=whiten_rewards, gamma=0.0)
        batch = replace(BATCH, values_BT=torch.zeros(4, 3).double())  # then advantages are the rewards
        rewards_N = ALGORITHMS["ppo"].advantages(batch, settings, 0.1).advantages_BT[MASK_BT]
        return rewards_N.mean().item(), rewards_N.std().item()

    (mean, std), (whitened_mean, whitened_std) = mean_reward(False), mean_reward(True)
    assert whitened_mean == pytest.approx(mean) and whitened_std == pytest.approx(1) != pytest.approx(std)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "grpo",
            [-0.75 / (1.5 / 2**0.5 + 1e-4), -1 / (2**0.5 + 1e-4), 0.75 / (1.5 / 2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4)],
        ),
        ("dr_grpo", [-0.75, -1, 0.75, 1]),
        # rewards less 0.1 · divergence are 1, -0.2, 2.5, 1.6
        ("rloo", [-1.5, -1.8, 1.5, 1.8]),
        ("reinforce", [1 - 1.225, -0.2 - 1.225, 2.5 - 1.225, 1.6 - 1.225]),
    ],
)
def test_a_completions_tokens_share_its_advantage(name: str, expected: list[float]):
    found = ALGORITHMS[name].advantages(BATCH, SETTINGS, 0.1)
    torch.testing.assert_close(found.advantages_BT, torch.tensor(expected).double()[:, None] * MASK_BT)
    assert found.returns_BT is None
    if ALGORITHMS[name].kl_in == "reward":
        torch.testing.assert_close(found.kl_B, KL_B)
    if ALGORITHMS[name].uses_groups:
        assert found.groups.num_groups == 2


def test_reinforces_baseline_is_the_mean_of_the_batch_and_can_be_left_out():
    def advantages(settings: AdvantageSettings) -> list[float]:
        half = ScoredBatch(BATCH.scores_B[:2], MASK_BT[:2], LOGPROBS_BT[:2])
        return ALGORITHMS["reinforce"].advantages(half, settings, 0.0).advantages_BT[:, 0].tolist()

    assert advantages(AdvantageSettings()) == [0.5, -0.5]
    assert advantages(AdvantageSettings(baseline=False)) == [1, 0]


@pytest.mark.parametrize(
    ("name", "missing"), [("ppo", "values_BT"), ("grpo", "groups_B"), ("dr_grpo", "groups_B"), ("rloo", "groups_B")]
)
def test_what_an_algorithm_rests_on_must_be_there(name: str, missing: str):
    with pytest.raises(ValueError, match=f"{name} asks for {missing}"):
        ALGORITHMS[name].advantages(replace(BATCH, **{missing: None}), SETTINGS, 0.1)


def test_without_a_reference_nothing_is_paid():
    for name in ("ppo", "rloo", "reinforce"):
        free = ALGORITHMS[name].advantages(replace(BATCH, reference_logprobs_BT=None), SETTINGS, 0.1)
        unpriced = ALGORITHMS[name].advantages(BATCH, SETTINGS, 0.0)
        torch.testing.assert_close(free.advantages_BT, unpriced.advantages_BT)
        assert free.kl_B is None
