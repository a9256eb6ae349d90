"""The figure of costs shows every number at its name."""

import io

from mmada.plots.cost import cost_figure


def test_every_measure_has_its_bars():
    parts = {"mixer": {"ms": 3.0, "MiB": 5.0, "MFLOP": 7.0}, "head": {"ms": 1.0, "MiB": 0.0, "MFLOP": 2.0}}
    without = {"full model": {"time": 1.0}, "without noise": {"time": 0.9}}
    figure = cost_figure(parts, without, "costs")
    shown = {axes.get_xlabel(): ([bar.get_width() for bar in axes.patches], len(axes.lines)) for axes in figure.axes}
    assert shown == {"ms": ([3.0, 1.0], 0), "MiB": ([5.0, 0.0], 0), "MFLOP": ([7.0, 2.0], 0),
                     "time": ([1.0, 0.9], 1), "": ([], 0)}  # fmt: skip
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["mixer", "head"]
    assert first.yaxis_inverted()  # the first row on top, as in the table


def test_a_model_of_which_nothing_can_be_left_out():
    figure = cost_figure({"head": {"ms": 1.0}}, {}, "costs")
    assert [len(axes.patches) for axes in figure.axes] == [1, 0]
    figure.savefig(io.BytesIO())
