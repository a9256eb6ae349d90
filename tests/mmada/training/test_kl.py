"""The divergence from the reference: estimators, coefficients, and its place in the reward."""

import pytest
import torch

from mmada.training.kl import AdaptiveKL, FixedKL, k1, k3, shape_scores, token_rewards


def test_k3_gives_the_golden_numbers_and_is_never_negative():
    x = torch.tensor([0.2, -0.3]).double()
    assert torch.allclose(k3(torch.zeros(2).double(), x), torch.tensor([0.021403, 0.040818]).double(), atol=1e-6)
    assert k3(torch.zeros(1), torch.tensor([1e-6])).item() == pytest.approx(5e-13, rel=0.1)  # no cancellation


def test_both_estimators_are_unbiased_for_the_divergence():
    policy_V, reference_V = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64).log()
    exact = (policy_V.exp() * (policy_V - reference_V)).sum().item()
    for estimator in (k1, k3):
        assert (policy_V.exp() * estimator(policy_V, reference_V)).sum().item() == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(("kl", "expected"), [(12.0, 0.201024), (3.0, 0.198976), (6.6, 0.2 * (1 + 0.1 * 0.0256))])
def test_adaptive_coefficient_gives_the_golden_numbers(kl: float, expected: float):
    controller = AdaptiveKL(0.2, target=6, horizon=10_000)
    controller.update(kl, 256)
    assert controller.coefficient == pytest.approx(expected, abs=1e-9)


def test_a_coefficient_goes_on_from_its_state():
    first, second = AdaptiveKL(0.2), AdaptiveKL(0.2)
    first.update(20, 500)
    second.load_state_dict(first.state_dict())
    assert second.coefficient == first.coefficient == pytest.approx(0.202)
    fixed = FixedKL(0.3)
    fixed.update(20, 500)
    fixed.load_state_dict(fixed.state_dict())
    assert fixed.coefficient == 0.3


def test_leaving_the_reference_costs_and_the_score_comes_with_the_last_token():
    mask_BT = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    kl_BT = k1(
        torch.tensor([[-1.0, -2, 9], [-1, -1, -1], [9, 9, 9]]), torch.tensor([[-3.0, -1, 7], [-1, -1, -2], [7, 7, 7]])
    )
    rewards_BT = token_rewards(torch.tensor([10.0, 20, 30]), mask_BT, kl_BT, kl_coefficient=0.1)
    # the policy likes the first token more than the reference does, the second less
    torch.testing.assert_close(rewards_BT, torch.tensor([[-0.2, 10.1, 0], [0, 0, 19.9], [0, 0, 0]]))
    torch.testing.assert_close(token_rewards(torch.tensor([1.0, 2, 3]), mask_BT).sum(dim=1), torch.tensor([1.0, 2, 0]))


def test_whitened_rewards_keep_their_mean():
    mask_BT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    plain_BT = token_rewards(torch.tensor([3.0, 8]).double(), mask_BT)
    whitened_BT = token_rewards(torch.tensor([3.0, 8]).double(), mask_BT, whitened=True)
    assert whitened_BT[mask_BT].mean().item() == pytest.approx(plain_BT[mask_BT].mean().item(), abs=1e-12)
    assert whitened_BT[mask_BT].var().item() == pytest.approx(1, abs=1e-6)


def test_completions_without_an_end_lose_the_penalty_after_the_clip():
    shaped_B = shape_scores(torch.tensor([9.0, -9, 0.5]), torch.tensor([True, False, False]), 1.0, score_clip=5)
    assert shaped_B.tolist() == [5, -6, -0.5]
    with pytest.raises(ValueError, match="pass finished_B"):
        shape_scores(torch.zeros(2), None, missing_end_penalty=1.0)
