"""The bench of the whole stack runs and measures what it says. What it measures is no test."""

import json

import pytest

from jobs.bench import train as bench
from jobs.cli import CommandError


@pytest.mark.parametrize(("path", "reason"), [("/nowhere/all.json", "make /nowhere first"), ("/", "name a file")])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(path, reason):
    with pytest.raises(CommandError, match=reason):
        bench.run(["--json", path])


@pytest.mark.timeout(240)
def test_every_contender_takes_its_turns(tmp_path, capfd):
    tiny = ["model.preset=debug", "model.num_experts=4", "train.global_batch=4", "train.sequence_length=32"]
    small = ["data.limit_documents=20", "cluster.threads_per_worker=1"]
    file = tmp_path / "figures.json"
    assert bench.run(["--rounds", "2", "--steps", "1", "--json", str(file), *tiny, *small]) == 0
    measured = json.loads(file.read_text())
    assert set(measured) == {bench.STACK, bench.BARE, bench.TRAINER, bench.PEAK}
    assert all(len(measured[name]) == 2 for name in (bench.STACK, bench.BARE, bench.TRAINER))
    assert all(value > 0 for values in measured.values() for value in values)
    out, err = capfd.readouterr()
    assert "128 tokens per step, preset debug, ZeRO 0" in out and "of the bare loop" in out and err == ""
