"""The reward model's loss against its formula, by hand and by torch's own functions."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmada.training.objectives.reward import RewardWeights, reward_losses

NAN = float("nan")


def losses(rewards, confidences=None, components=None, known=None, **weights):
    reward_B2 = torch.tensor(rewards, dtype=torch.float64, requires_grad=True)
    shape = (*reward_B2.shape, 4)
    confidence_B2 = torch.full(shape[:2], 0.5, dtype=torch.float64) if confidences is None else confidences
    components = torch.zeros(shape, dtype=torch.float64) if components is None else components
    known = torch.full(shape, NAN, dtype=torch.float64) if known is None else known
    none = {"margin": 0.0, "centering": 0.0, "proxies": 0.0, "confidence": 0.0}
    return reward_B2, reward_losses(reward_B2, confidence_B2, components, known, RewardWeights(**none | weights))


def test_bradley_terry_with_margin_and_centering():
    reward, found = losses([[0.5, -0.25], [0.1, 0.3]], margin=0.2, centering=0.01)
    by_hand = math.log(1 + math.exp(-(0.75 - 0.2))) + math.log(1 + math.exp(-(-0.2 - 0.2)))
    assert found.ranking.item() == pytest.approx(by_hand, abs=1e-12)
    assert found.loss.item() == pytest.approx(by_hand + 0.01 * (0.25**2 + 0.4**2), abs=1e-12)
    assert found.right.item() == 1
    found.loss.backward()
    slope = -torch.sigmoid(torch.tensor(-0.55)).item() + 2 * 0.01 * 0.25  # d/dr_w of the first pair
    assert reward.grad[0, 0].item() == pytest.approx(slope, abs=1e-7)


def test_proxies_that_are_unknown_have_no_part():
    components = torch.tensor([[[0.5, 0.0, -1.0, 0.2], [0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    proxies = torch.tensor([[[1.0, NAN, -1.0, 0.0], [NAN, NAN, NAN, 1.0]]], dtype=torch.float64)
    _, found = losses([[0.0, 0.0]], components=components, known=proxies, proxies=2.0)
    assert found.proxies.item() == pytest.approx((0.25 + 0 + 0.04 + 1) / 8)
    assert found.loss.item() == pytest.approx(math.log(2) + 2 * (0.25 + 0.04 + 1) / 8)
    found.loss.backward()
    assert not components.grad.isnan().any()
    assert (components.grad[proxies.isnan()] == 0).all() and components.grad[0, 0, 0] < 0


def test_confidence_is_taught_whether_the_pair_was_right():
    confidences = torch.tensor([[0.9, 0.6], [0.9, 0.2]], dtype=torch.float64, requires_grad=True)
    reward, found = losses([[0.5, 0.1], [-0.5, 0.1]], confidences, confidence=1.0)
    targets = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    expected = F.binary_cross_entropy(confidences.detach(), targets) * 2
    assert found.confidence.item() == pytest.approx(expected.item())
    found.loss.backward()
    assert (confidences.grad[0] < 0).all() and (confidences.grad[1] > 0).all()


def test_the_sum_of_two_batches_is_that_of_both():
    generator = torch.Generator().manual_seed(0)
    rewards, confidences = torch.rand(6, 2, generator=generator), torch.rand(6, 2, generator=generator)
    components, proxies = torch.rand(6, 2, 4, generator=generator), torch.rand(6, 2, 4, generator=generator)
    proxies[torch.rand(6, 2, 4, generator=generator) < 0.4] = NAN
    parts = [rewards, confidences, components, proxies]
    whole = reward_losses(*parts, RewardWeights())
    halves = [reward_losses(*(part[rows] for part in parts), RewardWeights()) for rows in (slice(2), slice(2, 6))]
    assert sum(half.loss for half in halves).item() == pytest.approx(whole.loss.item(), rel=1e-6)
