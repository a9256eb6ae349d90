"""Calibration losses: golden vectors, other libraries, plain loops, and gradients against finite differences."""

import pytest
import torch
from sklearn.metrics import brier_score_loss
from torchmetrics.classification import MulticlassCalibrationError

from mmada.training.objectives.calibration import (
    NUM_BINS,
    TEMPERATURE,
    brier_score,
    calibration_error,
    hard_bins,
    mmce,
    soft_calibration_error,
)

CONFIDENCE = torch.tensor([0.95, 0.85, 0.75, 0.65, 0.55, 0.45], dtype=torch.float64)
CORRECT = torch.tensor([1, 1, 0, 1, 0, 0])


def predictions(seed: int, num: int = 400, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (N, V), some of them sharp, and what was to be predicted (N,), which they often miss."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num, classes, generator=generator, dtype=torch.float64)
    noise = 2 * torch.randn(num, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(1), (logits + noise).argmax(1)


def judged(probability: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    confidence, answer = probability.max(dim=1)
    return confidence, (answer == target).double()


@pytest.mark.parametrize(("bins", "error"), [(5, 0.266667), (10, 0.383333)])
def test_the_hard_error_of_the_golden_vector(bins, error):
    assert float(calibration_error(hard_bins(CONFIDENCE, CORRECT, bins))) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_hard_error_is_that_of_torchmetrics(seed):
    probability, target = predictions(seed)
    theirs = MulticlassCalibrationError(num_classes=6, n_bins=NUM_BINS, norm="l1")(probability, target)
    ours = calibration_error(hard_bins(*judged(probability, target)))
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6) and float(ours) > 0.05


def test_edges_are_those_of_torchmetrics_but_for_a_confidence_of_one():
    """A bin holds its lower edge. A confidence of exactly 1 has a bin of its own there, and the last one here."""
    confidence = torch.tensor([0.5, 0.5625, 0.625, 0.75, 0.75, 0.9375], dtype=torch.float64)
    correct = torch.tensor([1, 0, 1, 0, 1, 1])
    metric = MulticlassCalibrationError(num_classes=2, n_bins=16, norm="l1")

    def theirs(confidence: torch.Tensor, correct: torch.Tensor) -> float:
        return float(metric(torch.stack([1 - confidence, confidence], dim=1), correct))

    assert float(calibration_error(hard_bins(confidence, correct, 16))) == pytest.approx(theirs(confidence, correct))
    ones, half = torch.tensor([0.96875, 1.0], dtype=torch.float64), torch.tensor([1, 0])
    assert theirs(ones, half) == pytest.approx((0.03125 + 1) / 2)
    assert float(calibration_error(hard_bins(ones, half, 16))) == pytest.approx((0.96875 + 1 - 1) / 2)


@pytest.mark.parametrize("temperature", [TEMPERATURE, 0.1])
def test_soft_bins_are_their_plain_loop_by_value_and_gradient(temperature):
    probability, target = predictions(3, num=30)
    confidence, correct = judged(probability, target)
    ours, plain = confidence.clone().requires_grad_(), confidence.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for m in range(NUM_BINS):
        gap = torch.zeros((), dtype=torch.float64)
        for one, right in zip(plain, correct, strict=True):
            weights = [torch.exp(-((one - (k + 0.5) / NUM_BINS) ** 2) / temperature) for k in range(NUM_BINS)]
            gap = gap + weights[m] / sum(weights) * (right - one)
        total = total + gap.abs() / len(plain)
    found = soft_calibration_error(ours, correct, temperature)
    torch.testing.assert_close(found, total, rtol=1e-12, atol=1e-14)
    found.backward()
    total.backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-12)


def test_sharp_soft_bins_are_hard_ones_and_a_confidence_of_one_has_a_bin():
    hard = calibration_error(hard_bins(CONFIDENCE, CORRECT))
    # Inside a bin the nearest middle is the bin's own.
    assert float(soft_calibration_error(CONFIDENCE, CORRECT, temperature=1e-7)) == pytest.approx(float(hard), abs=1e-9)
    confidence, correct = judged(*predictions(4))
    place = confidence * NUM_BINS
    inside = (place - place.round()).abs() > 1e-3
    confidence, correct = confidence[inside], correct[inside]
    gaps = [
        float(
            soft_calibration_error(confidence, correct, temperature) - calibration_error(hard_bins(confidence, correct))
        )
        for temperature in (1e-3, 1e-7)
    ]
    assert abs(gaps[0]) > 1e-4 and abs(gaps[1]) < 1e-12
    assert float(calibration_error(hard_bins(torch.ones(4), torch.tensor([1, 1, 0, 0])))) == pytest.approx(0.5)
    assert float(soft_calibration_error(torch.zeros(0), torch.zeros(0))) == 0.0


@pytest.mark.parametrize("width", [0.4, 0.05])
def test_mmce_is_its_double_sum_by_value_and_gradient(width):
    probability, target = predictions(5, num=25)
    confidence, correct = judged(probability, target)
    ours, plain = confidence.clone().requires_grad_(), confidence.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for r, c in zip(plain, correct, strict=True):
        for other_r, other_c in zip(plain, correct, strict=True):
            total = total + (c - r) * (other_c - other_r) * torch.exp(-(r - other_r).abs() / width)
    expected, found = total.sqrt() / len(plain), mmce(ours, correct, width)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-12)


def test_brier_is_the_squared_distance_to_the_truth_as_in_scikit_learn():
    probability = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], dtype=torch.float64)
    assert float(brier_score(probability, torch.tensor([0, 2]))) == pytest.approx((0.14 + 1.46) / 2, rel=1e-12)
    probability, target = predictions(6)
    theirs = brier_score_loss(target.numpy(), probability.numpy(), labels=range(6), scale_by_half=False)
    assert float(brier_score(probability, target)) == pytest.approx(theirs, rel=1e-12)
    ours, plain = probability.clone().requires_grad_(), probability.clone().requires_grad_()
    brier_score(ours, target).backward()
    (plain - torch.nn.functional.one_hot(target, 6)).square().sum(1).mean().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [soft_calibration_error, mmce])
def test_gradients_are_those_of_finite_differences(loss):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    correct = (torch.arange(20) % 3 > 0).double()
    assert torch.autograd.gradcheck(lambda x: loss(x.sigmoid(), correct), [logits], eps=1e-7, atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda x: brier_score(x.view(4, 5).softmax(1), torch.arange(4)), [logits], eps=1e-7, atol=1e-6
    )
