"""``mmada bench moe``: its arithmetic, its arguments, and one small run from the command line."""

import json
import subprocess
import sys

import pytest

from jobs.bench.moe import FLOOR, PEAK, Shape, Timings, parse, peak_flops, read_shape, short
from jobs.cli import CommandError


def test_ratios_are_taken_within_a_round() -> None:
    floor = Timings(FLOOR, [10.0, 100.0, 20.0])
    ours = Timings("mmada", [12.0, 130.0, 22.0])  # 1.2, 1.3 and 1.1 times the floor, whatever the round
    assert ours.ratios(floor) == pytest.approx((1.15, 1.2, 1.25))
    assert (ours.median, ours.best) == (22.0, 12.0)


def test_flops_and_peak() -> None:
    # 2 tokens, 2 experts each, 3 projections of 5 by 7; 2 FLOPs a weight, and 3 times that with the backward pass
    assert Shape(5, 7, 4, 2, 2).flops == 2 * 2 * 3 * 5 * 7 * 2 * 3
    assert peak_flops({PEAK: Timings(PEAK, [200.0, 100.0])}) == pytest.approx(2 * 2048**3 / 0.1)


@pytest.mark.parametrize(("value", "text"), [(1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1234")])
def test_three_digits(value: float, text: str) -> None:
    assert short(value) == text


def test_shapes_are_read() -> None:
    assert read_shape("512x1024x16x2x2048") == Shape(512, 1024, 16, 2, 2048)
    assert parse(["--shape", "8x8x2x1x4", "--shape", "8x8x4x1x4"]).shape == [Shape(8, 8, 2, 1, 4), Shape(8, 8, 4, 1, 4)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "3x3"], "--shape: 3x3 is not five sizes"),
        (["--shape", "3x3x2x0x4"], "--shape: 3x3x2x0x4 is not five sizes"),
        (["--shape", "3x3x2x4x4"], "takes 4 of 2 experts; use K up to E"),
        (["--rounds", "1"], "use 2 or more"),
        (["--threads", "0"], "use 1 or more"),
        (["--json", "/nowhere/at/all.json"], "make /nowhere/at first"),
    ],
)
def test_wrong_arguments_are_refused(args: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        parse(args)


def test_a_small_run_prints_the_table_and_nothing_else(tmp_path) -> None:
    arguments = ["bench", "moe", "--shape", "16x8x4x3x32", "--rounds", "2", "--threads", "1"]
    command = [sys.executable, "-m", "jobs.cli", *arguments, "--json", str(tmp_path / "times.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("width 16, expert width 8, 4 experts, top 3, 32 tokens")
    (record,) = json.loads((tmp_path / "times.json").read_text())
    assert record["shape"]["top_k"] == 3
    for name, layer in record["layers"].items():
        assert name in done.stdout
        assert len(layer["milliseconds"]) == 2
        assert all(milliseconds > 0 for milliseconds in layer["milliseconds"])
    assert set(record["layers"]) >= {FLOOR, "mmada", "DeepSpeed, none dropped", "transformers, grouped"}
