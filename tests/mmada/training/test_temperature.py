"""Temperature scaling beside a minimiser of its own over gradients, and on predictions whose temperature is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmada.training.temperature import LEAST, MOST, fit_temperature


def drawn(num: int, temperature: float, seed: int) -> tuple[Tensor, Tensor]:
    """Logits (N, V) that are too sharp by this factor, and targets drawn from what they should say."""
    generator = torch.Generator().manual_seed(seed)
    honest_NV = 2 * torch.randn(num, 12, generator=generator, dtype=torch.float64)
    target_N = torch.multinomial(honest_NV.softmax(-1), 1, generator=generator)[:, 0]
    return honest_NV * temperature, target_N


def loss_of(logits_NV: Tensor, target_N: Tensor):
    return lambda temperature: float(cross_entropy(logits_NV / temperature, target_N))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_it_is_the_minimum_that_gradients_find(temperature):
    logits_NV, target_N = drawn(400, temperature, seed=1)
    log = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log], lr=0.1, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(logits_NV / log.exp(), target_N)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert fit_temperature(loss_of(logits_NV, target_N)) == pytest.approx(math.exp(log.item()), rel=1e-5)


def test_it_finds_by_how_much_logits_are_too_sharp():
    assert fit_temperature(loss_of(*drawn(40_000, 3.0, seed=2))) == pytest.approx(3.0, rel=0.03)


def test_it_stays_within_bounds_and_wants_finite_losses():
    right = loss_of(torch.eye(4, dtype=torch.float64), torch.arange(4))  # all right: the surer the better
    assert fit_temperature(right) == pytest.approx(LEAST, rel=1e-3)
    wrong = loss_of(torch.eye(4, dtype=torch.float64), (torch.arange(4) + 1) % 4)
    assert fit_temperature(wrong) == pytest.approx(MOST, rel=1e-2)
    with pytest.raises(ValueError, match="loss=nan at temperature 1 is not finite"):
        fit_temperature(lambda temperature: math.nan)
