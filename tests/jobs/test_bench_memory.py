"""``mmada bench memory``: what the peer is asked for, and what is said where it is not installed."""

import json
import sys
from types import SimpleNamespace

import pytest
from torch import nn

from jobs.bench import memory as bench
from jobs.cli import CommandError


def test_a_peer_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)  # what makes an import fail
    with pytest.raises(CommandError, match="package=titans-pytorch .* pip install titans-pytorch"):
        bench.run(["--quick"])


def test_a_length_that_the_peer_cannot_cut_is_refused():
    with pytest.raises(CommandError, match="--lengths=100 is not a multiple of --chunk=16"):
        bench.run(["--lengths", "100"])


def test_the_papers_chunk_is_the_peers_batch_size(monkeypatch, tmp_path, capfd):
    asked = []

    class NeuralMemory(nn.Linear):
        def __init__(self, dim, **settings):
            super().__init__(dim, dim)
            asked.append(settings)

        def forward(self, hidden):
            return super().forward(hidden), "the memory's state"

    monkeypatch.setitem(sys.modules, "titans_pytorch", SimpleNamespace(NeuralMemory=NeuralMemory))
    assert bench.run(["--quick", "--threads", "1", "--json", str(tmp_path / "all.json")]) == 0
    per_token, per_chunk = asked
    assert (per_token["chunk_size"], per_token["batch_size"]) == (1, 4)
    assert (per_chunk["chunk_size"], per_chunk["batch_size"]) == (4, 4)
    for settings in asked:
        assert (settings["heads"], settings["dim_head"]) == (2, 8)
        assert settings["default_model_kwargs"] == {"depth": 2, "expansion_factor": 2.0}
        assert not settings["mem_model_norm_add_residual"] and not settings["pre_rmsnorm"]
    written = json.loads((tmp_path / "all.json").read_text())
    assert set(written["milliseconds"]["16"]) == {bench.OURS, bench.PER_TOKEN, bench.PER_CHUNK}
    out, err = capfd.readouterr()
    assert err == "" and out.count(" times titans-pytorch") == 2


def test_our_memory_is_built_as_asked():
    options = SimpleNamespace(width=32, heads=2, head_dim=8, depth=3, expansion=2, chunk=4)
    memory = bench.ours(options).mixer.memory
    assert (memory.rule.chunk_size, memory.rule.max_gradient_norm, memory.convolution) == (4, None, None)
    assert memory.start.widths == [8, 16, 16, 8]
