"""``mmada bench ssm``: the same sizes on both sides, and a table of every contender."""

import json

import pytest

from jobs.bench import ssm as bench
from jobs.bench.lengths import num_parameters, slope, speed_ratios
from jobs.cli import CommandError


def test_both_sides_have_the_same_sizes(tmp_path, capfd):
    assert bench.run(["--quick", "--threads", "1", "--json", str(tmp_path / "all.json")]) == 0
    written = json.loads((tmp_path / "all.json").read_text())
    parameters = {name: each["parameters"] for name, each in written["runners"].items()}
    same, default = f"{bench.MAMBA2}, chunk 8", f"{bench.MAMBA2}, chunk 16"
    assert parameters[bench.SSD] == parameters[same] == parameters[default]
    assert parameters[bench.SCAN] == parameters[bench.MAMBA]
    ran = {length: set(taken) for length, taken in written["milliseconds"].items()}
    assert ran["16"] == {bench.SSD, same, default, bench.SCAN, bench.MAMBA}
    assert ran["32"] == ran["16"] - {bench.MAMBA}  # the loop over tokens is run at short lengths only
    out, err = capfd.readouterr()
    assert err == "" and all(f" {name} " in out for name in parameters) and "time grows as" in out


def test_a_ratio_above_one_is_ours_being_faster():
    taken = {"ours": [10.0, 20.0], "theirs": [30.0, 40.0]}
    assert speed_ratios(taken, "ours", "theirs") == [3.0, 2.0]
    assert speed_ratios(taken, "ours", "absent") == []
    assert slope({64: [1.0, 2.0, 9.0], 128: [8.0, 8.0, 8.0]}) == pytest.approx(2)  # of the medians


def test_the_layer_runs_alone_as_it_is_built(monkeypatch):
    layer = bench.ours("ssd", bench_options(width=32, state=4, head_dim=16, chunk=8))
    assert layer.mixer.core.chunk_size == 8 and layer.mixer.core.num_heads == 4
    assert num_parameters(layer) == sum(parameter.numel() for parameter in layer.mixer.parameters())


def bench_options(**values):
    return type("Options", (), values)()


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(CommandError, match="--head-dim=48 does not divide twice --width=128"):
        bench.run(["--head-dim", "48"])


def test_lengths_are_whole_numbers():
    with pytest.raises(CommandError, match="--lengths: many is not a whole number from 1 on"):
        bench.run(["--lengths", "512,many"])
