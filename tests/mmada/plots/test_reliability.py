"""The reliability figure: a point for each bin that has predictions, at its mean confidence and share right."""

import pytest

from mmada.plots.reliability import reliability


def test_empty_bins_are_left_out_and_the_others_stand_where_they_are():
    bins = {
        "as trained": {"count": [4.0, 0.0, 6.0], "confidence": [1.0, 0.0, 5.4], "correct": [2.0, 0.0, 3.0]},
        "at temperature 2.00": {"count": [10.0, 0.0, 0.0], "confidence": [2.0, 0.0, 0.0], "correct": [5.0, 0.0, 0.0]},
    }
    axes = reliability(bins, "run").axes[0]
    diagonal, raw, scaled = axes.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    assert list(raw.get_xdata()) == pytest.approx([0.25, 0.9]) and list(raw.get_ydata()) == pytest.approx([0.5, 0.5])
    assert list(scaled.get_xdata()) == pytest.approx([0.2]) and scaled.get_label() == "at temperature 2.00"
    assert axes.get_title() == "run" and axes.get_xlabel() == "confidence"
