"""The price of operations and nearness to a model: exact values, and gradients against finite differences."""

import pytest
import torch

from mmada.training.objectives.compute import GateCost, expected_cost, hinge, time_hinge
from mmada.training.objectives.safety import divergence, lagrangian, squared_weights


def test_operations_are_expected_over_the_gates():
    costs = {"a": GateCost(open=10.0, shut=30.0), "b": GateCost(open=50.0, shut=20.0)}
    gates = {name: torch.tensor(p, dtype=torch.float64, requires_grad=True) for name, p in (("a", 0.25), ("b", 0.5))}
    cost = expected_cost(gates, costs)
    assert cost.item() == pytest.approx((0.25 * 10 + 0.75 * 30 + 0.5 * 50 + 0.5 * 20) / 80)
    cost.backward()
    assert float(gates["a"].grad) == pytest.approx(-20 / 80) and float(gates["b"].grad) == pytest.approx(30 / 80)
    assert [float(hinge(torch.tensor(c), 0.5)) for c in (0.4, 0.5, 0.7)] == pytest.approx([0.0, 0.0, 0.04])
    assert time_hinge([1.0, 3.0], 2.0) == 0.5 and time_hinge([], 1.0) == 0.0


def test_divergence_is_torchs_and_falls_to_nothing():
    generator = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 6, 5, generator=generator)
    expected = torch.nn.functional.kl_div(other.log_softmax(-1), own.log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(divergence(own, other), expected)
    assert float(divergence(own, own)) == 0.0
    assert float(lagrangian(torch.tensor(0.3), 0.1, 2.0)) == pytest.approx(0.4)
    assert float(squared_weights([torch.ones(3), torch.full((2, 2), 2.0)])) == 19.0
