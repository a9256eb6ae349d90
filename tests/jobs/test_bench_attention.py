"""``mmada bench attention``: bytes and caches are exact, and the kernels that are timed compute the same."""

import json

import pytest
import torch
from torch.testing import assert_close

from jobs.bench import attention as bench
from jobs.bench.attention_kernels import Heads, Kernel, MaskedSDPA, saved_bytes, window_mask
from jobs.cli import CommandError

HEADS = Heads(num_heads=4, num_key_value_heads=2, head_dim=8)


def test_the_window_in_bands_is_the_window_as_a_mask():
    states = torch.randn(2, 150, HEADS.width)
    banded, masked = Kernel(HEADS, "sdpa", window=40), MaskedSDPA(HEADS, window=40)
    assert_close(banded(states), masked(states).transpose(1, 2))
    assert window_mask(5, 2).sum() == 1 + 4 * 2  # the token itself and one before it


def test_a_kernel_that_keeps_no_scores_keeps_this():
    length = 96
    states, mixed, log_sums = (length * 4 * each for each in (HEADS.width, 4 * 8, 4))
    assert saved_bytes(Kernel(HEADS, "blockwise"), HEADS.width, length) == states + mixed + log_sums
    assert saved_bytes(Kernel(HEADS, "eager"), HEADS.width, length) > 4 * 4 * length**2  # its weights at least


def test_cache_sizes_of_heads_and_windows_are_exact():
    caches = bench.cache_sizes(length=64, window=32)
    assert all(sizes["bytes"] == sizes["formula"] for sizes in caches.values())
    full = caches["16 key/value heads"]["bytes"]
    saved = {name: 1 - sizes["bytes"] / full for name, sizes in caches.items()}
    assert saved == {
        "16 key/value heads": 0,
        "8": 0.5,
        "4": 0.75,
        "16, window 32 in all layers": 0.5,
        "8, window 32 in every second layer": 0.625,
        "8, window 32 in all layers": 0.75,
        "4, window 32 in all layers": 0.875,
    }


def test_a_quick_run_prints_every_row(tmp_path, capfd):
    assert bench.run(["--quick", "--threads", "1", "--json", str(tmp_path / "all.json")]) == 0
    out, err = capfd.readouterr()
    written = json.loads((tmp_path / "all.json").read_text())
    names = [*written["runners"], *written["kept"], *written["caches"]]
    assert err == "" and all(f" {name} " in out for name in names) and " 87.50% " in out and "1 threads" in out
    assert {len(taken) for each in written["milliseconds"].values() for taken in each.values()} == {2}


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(CommandError, match="--kv-heads=3 does not divide --heads=4"):
        bench.run(["--kv-heads", "3"])
