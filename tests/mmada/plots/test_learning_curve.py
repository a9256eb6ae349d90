"""The learning curve as a figure."""

import pytest

from mmada.plots.learning_curve import learning_curve, mark_stages


def test_stages_are_marked_where_they_begin():
    figure = learning_curve([(1, 2.0), (2, 1.0), (3, 0.5)], [(2, 3.0)], "a run")
    before = len(figure.axes[0].lines)
    mark_stages(figure, [(1, "core"), (3, "sums")])
    (axes,) = figure.axes
    assert [line.get_xdata()[0] for line in axes.lines[before:]] == [1, 3]
    assert [(text.get_position()[0], text.get_text().strip()) for text in axes.texts] == [(1, "core"), (3, "sums")]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training, bits per token", "held out, bits per byte"]  # stages are no curves
    assert axes.lines[0].get_ydata()[0] == pytest.approx(2.885, abs=1e-3)  # 2 nats in bits
