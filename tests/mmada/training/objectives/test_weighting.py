"""Losses combined: each rule against the gradients themselves, or worked out by hand."""

import math
import random

import pytest
import torch

from mmada.training.objectives.weighting import (
    WeightState,
    after_constraint,
    after_gradnorm,
    after_uncertainty,
    projection_coefficients,
    scheduled,
    uncertainty_weights,
)


def pcgrad(gradients: list[torch.Tensor], seed: int) -> torch.Tensor:
    """Algorithm 1 of arXiv:2001.06782 on the gradients themselves."""
    shuffle, total = random.Random(seed), torch.zeros_like(gradients[0])
    for i, own in enumerate(gradients):
        own = own.clone()
        others = [j for j in range(len(gradients)) if j != i]
        shuffle.shuffle(others)
        for j in others:
            along = own @ gradients[j]
            if along < 0:
                own -= along / gradients[j].square().sum() * gradients[j]
        total += own
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_projection_by_products_is_projection_of_gradients(count):
    generator = torch.Generator().manual_seed(count)
    for seed in range(10):
        gradients = torch.randn(count, 7, generator=generator, dtype=torch.float64)
        coefficients = projection_coefficients(gradients @ gradients.T, seed)
        torch.testing.assert_close(coefficients @ gradients, pcgrad([*gradients], seed), rtol=1e-10, atol=1e-12)


def test_gradients_that_agree_are_left_alone_and_none_divides_by_zero():
    gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert projection_coefficients(gradients @ gradients.T, 0).tolist() == [1.0, 1.0, 1.0]


def test_uncertainty_goes_down_its_own_gradient_to_where_the_weight_is_half_of_one_over_the_loss():
    state, losses = WeightState(log_variances={"a": 0.3}), {"a": 2.0}
    s = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (0.5 * torch.exp(-s) * 2.0 + 0.5 * s).backward()
    after = after_uncertainty(state, losses, rate=0.1)
    assert after.log_variances["a"] == pytest.approx(0.3 - 0.1 * float(s.grad), rel=1e-12)
    for _ in range(2000):
        state = after_uncertainty(state, losses, rate=0.05)
    assert uncertainty_weights(state, ["a"])["a"] == pytest.approx(1 / (2 * 2.0), rel=1e-4)
    assert uncertainty_weights(WeightState(), ["a"]) == {"a": 0.5}


def test_a_step_of_gradnorm_goes_down_the_gradient_of_its_own_loss():
    """Algorithm 1 of arXiv:1711.02257 by autograd, on losses with known gradients."""
    losses, norms = {"a": 0.8, "b": 2.4, "c": 0.5}, {"a": 3.0, "b": 0.2, "c": 1.0}
    first, old = {"a": 1.0, "b": 2.0, "c": 2.0}, {"a": 0.7, "b": 1.5, "c": 0.8}
    w = torch.tensor([*old.values()], dtype=torch.float64, requires_grad=True)
    norm = torch.tensor([*norms.values()], dtype=torch.float64)
    fallen = torch.tensor([losses[name] / first[name] for name in losses], dtype=torch.float64)
    target = ((w * norm).mean() * (fallen / fallen.mean()) ** 1.5).detach()
    (w * norm - target).abs().sum().backward()
    stepped = w.detach() - 0.01 * w.grad
    expected = stepped * 3 / stepped.sum()
    after = after_gradnorm(WeightState(first=first, scales=old), losses, norms, alpha=1.5, rate=0.01)
    assert [*after.scales.values()] == pytest.approx(expected.tolist(), rel=1e-12)
    assert after.first == first


def test_normalised_gradients_become_alike():
    """Two losses that fall alike, one with a gradient ten times as large: in the end both weigh the same."""
    state, norms = WeightState(), {"a": 10.0, "b": 1.0}
    for _ in range(4000):
        state = after_gradnorm(state, {"a": 1.0, "b": 1.0}, norms, alpha=1.5, rate=1e-4)
    weighted = {name: state.scales[name] * norms[name] for name in norms}
    assert weighted["a"] == pytest.approx(weighted["b"], rel=0.02)
    assert sum(state.scales.values()) == pytest.approx(2.0)


def test_a_loss_that_falls_slowly_is_favoured():
    state = WeightState(first={"slow": 1.0, "fast": 1.0})
    for _ in range(8000):
        state = after_gradnorm(state, {"slow": 0.9, "fast": 0.3}, {"slow": 1.0, "fast": 1.0}, alpha=1.0, rate=1e-4)
    assert state.scales["slow"] / state.scales["fast"] == pytest.approx(3.0, rel=0.02)  # (0.9 / 0.3) ** alpha


def test_a_multiplier_rises_while_the_cost_is_too_high_and_stops_at_zero():
    state, found = WeightState(), []
    for cost in (0.3, 0.3, 0.0, 0.0, 0.0):
        state = after_constraint(state, "safety", cost, limit=0.1, rate=0.5)
        found.append(state.multipliers["safety"])
    assert found == pytest.approx([0.1, 0.2, 0.15, 0.1, 0.05])
    assert after_constraint(WeightState(), "safety", 0.0, 0.1, 1.0).multipliers["safety"] == 0.0


def test_weights_on_a_line():
    assert [scheduled((0.0, 0.4), share) for share in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert scheduled(0.3, 0.5) == 0.3 and not math.isnan(scheduled(0.0, 0.0))
