"""Learning rates, each at the steps where it could be wrong by one."""

import math

import pytest

from mmada.training.schedules import AdaptiveRate, Schedule, warmup_cosine

OWN = Schedule(peak=2.0, steps=11, warmup_steps=1, min_ratio=0.1, decay_steps=5)


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("cosine", {0: 2.0, 1: 2.0, 10: 0.2}),
        ("linear", {0: 2.0, 1: 2.0, 4: 2 * (1 - 0.9 * 3 / 9), 10: 0.2}),
        ("constant", {0: 2.0, 5: 2.0, 10: 2.0}),
        ("wsd", {1: 2.0, 5: 2.0, 6: 2 * (1 - 0.9 / 5), 10: 0.2}),
        ("inverse_sqrt", {0: 2.0, 3: 2 / math.sqrt(4), 10: 2 / math.sqrt(11)}),
        ("adaptive", {0: 2.0, 10: 2.0}),
    ],
)
def test_rates_are_what_they_are_called(kind, rates):
    assert {step: OWN.rate(kind, step) for step in rates} == pytest.approx(rates)


def test_the_warm_up_is_a_straight_line_of_all_kinds():
    slow = Schedule(peak=1.0, steps=10, warmup_steps=4)
    for kind in ("cosine", "linear", "constant", "wsd", "inverse_sqrt", "adaptive"):
        assert [slow.rate(kind, step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, slow.rate(kind, 4)])
    assert warmup_cosine(7, peak=1.0, steps=10, warmup_steps=4, min_ratio=0.0) == slow.rate("cosine", 7)


def test_a_plateau_lowers_the_rate_and_what_becomes_better_does_not():
    rate, factors = AdaptiveRate(), []
    for loss in (3.0, 2.0, 2.0, 2.1, 1.5, 1.5, 1.5):
        rate = rate.after_evaluation(loss, decay=0.5, patience=2, min_delta=0.0)
        factors.append(rate.factor)
    assert factors == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]
    assert rate.scale(None, 0.1) == 0.25 and rate.scale(None, 0.3) == 0.3


def test_noisy_gradients_hold_the_rate_back_and_steady_ones_do_not():
    steady, noisy = AdaptiveRate(), AdaptiveRate()
    for step in range(400):
        steady, noisy = steady.after_step(1.0), noisy.after_step(2.0 if step % 2 else 0.0)
    assert steady.noise == pytest.approx(0.0, abs=1e-6) and noisy.noise == pytest.approx(1.0, rel=0.1)
    assert steady.scale(0.5, 0.0) == 1.0 and noisy.scale(0.5, 0.0) == pytest.approx(0.5, rel=0.1)
