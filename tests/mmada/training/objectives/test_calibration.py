"""Calibration losses: golden vectors, exact values, and gradients against finite differences."""

import pytest
import torch

from mmada.training.objectives.calibration import (
    brier_score,
    calibration_error,
    hard_bins,
    mmce,
    soft_calibration_error,
)

CONFIDENCE = torch.tensor([0.95, 0.85, 0.75, 0.65, 0.55, 0.45], dtype=torch.float64)
CORRECT = torch.tensor([1, 1, 0, 1, 0, 0])


@pytest.mark.parametrize(("bins", "error"), [(5, 0.266667), (10, 0.383333)])
def test_the_hard_error_of_the_golden_vector(bins, error):
    assert float(calibration_error(hard_bins(CONFIDENCE, CORRECT, bins))) == pytest.approx(error, abs=1e-6)


def test_sharp_soft_bins_are_hard_ones_and_a_confidence_of_one_has_a_bin():
    hard = calibration_error(hard_bins(CONFIDENCE, CORRECT))
    # Inside a bin the nearest middle is the bin's own.
    assert float(soft_calibration_error(CONFIDENCE, CORRECT, temperature=1e-7)) == pytest.approx(float(hard), abs=1e-9)
    assert float(calibration_error(hard_bins(torch.ones(4), torch.tensor([1, 1, 0, 0])))) == pytest.approx(0.5)
    assert float(soft_calibration_error(torch.zeros(0), torch.zeros(0))) == 0.0


def test_mmce_is_its_double_sum():
    total = 0.0
    for c, r in zip(CORRECT.tolist(), CONFIDENCE.tolist(), strict=True):
        for other_c, other_r in zip(CORRECT.tolist(), CONFIDENCE.tolist(), strict=True):
            kernel = torch.exp(torch.tensor(-abs(r - other_r) / 0.4, dtype=torch.float64)).item()
            total += (c - r) * (other_c - other_r) * kernel
    assert float(mmce(CONFIDENCE, CORRECT)) == pytest.approx(total**0.5 / 6, rel=1e-12)


def test_brier_is_the_squared_distance_to_the_truth():
    probability = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], dtype=torch.float64)
    target = torch.tensor([0, 2])
    truth = torch.nn.functional.one_hot(target, 3)
    expected = (probability - truth).square().sum(1).mean()
    assert float(brier_score(probability, target)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("loss", [soft_calibration_error, mmce])
def test_gradients_are_those_of_finite_differences(loss):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    correct = (torch.arange(20) % 3 > 0).double()
    assert torch.autograd.gradcheck(lambda x: loss(x.sigmoid(), correct), [logits], eps=1e-7, atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda x: brier_score(x.view(4, 5).softmax(1), torch.arange(4)), [logits], eps=1e-7, atol=1e-6
    )
