"""The price of operations and nearness to a model: exact values, torch's own, and finite differences."""

import pytest
import torch

from mmada.training.objectives.compute import GateCost, expected_cost, hinge, time_hinge
from mmada.training.objectives.safety import divergence, squared_weights

COSTS = {"a": GateCost(open=10.0, shut=30.0), "b": GateCost(open=50.0, shut=20.0)}


def test_operations_are_expected_over_the_gates():
    gates = {name: torch.tensor(p, dtype=torch.float64, requires_grad=True) for name, p in (("a", 0.25), ("b", 0.5))}
    cost = expected_cost(gates, COSTS)
    assert cost.item() == pytest.approx((0.25 * 10 + 0.75 * 30 + 0.5 * 50 + 0.5 * 20) / 80)
    cost.backward()
    assert float(gates["a"].grad) == pytest.approx(-20 / 80) and float(gates["b"].grad) == pytest.approx(30 / 80)
    assert [float(hinge(torch.tensor(c), 0.5)) for c in (0.4, 0.5, 0.7)] == pytest.approx([0.0, 0.0, 0.04])
    assert time_hinge([1.0, 3.0], 2.0) == 0.5 and time_hinge([], 1.0) == 0.0


@pytest.mark.parametrize(("target", "is_dear"), [(0.3, True), (0.95, False)])
def test_the_hinges_gradients_are_those_of_finite_differences(target, is_dear):
    logits = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)

    def price(logits: torch.Tensor) -> torch.Tensor:
        return hinge(expected_cost(dict(zip("ab", logits.sigmoid(), strict=True)), COSTS), target)

    assert torch.autograd.gradcheck(price, [logits])
    (gradient,) = torch.autograd.grad(price(logits), logits)
    assert (gradient != 0).all() == is_dear and (gradient == 0).all() != is_dear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_is_torchs_and_falls_to_nothing(dtype):
    generator = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 6, 5, generator=generator, dtype=dtype)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=own), torch.distributions.Categorical(logits=other)
    ).sum()
    assert expected.dtype == divergence(own, other).dtype == dtype
    torch.testing.assert_close(divergence(own, other), expected)
    assert float(divergence(own, own)) == 0.0 and float(divergence(own[:0], other[:0])) == 0.0
    assert divergence(own.bfloat16(), other.bfloat16()).dtype == torch.float32
    assert float(squared_weights([torch.ones(3), torch.full((2, 2), 2.0)])) == 19.0


def test_divergences_gradients_are_those_of_finite_differences_and_of_torch():
    generator = torch.Generator().manual_seed(1)
    own, other = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    own.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: divergence(logits, other), [own])
    (ours,) = torch.autograd.grad(divergence(own, other), own)
    law = torch.distributions.Categorical
    theirs = torch.autograd.grad(torch.distributions.kl_divergence(law(logits=own), law(logits=other)).sum(), own)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
