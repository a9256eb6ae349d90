"""What is free within limits, and what work takes: numbers that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.device_memory import MemoryMeter, free_memory, group_limits, tensors_in


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_limits_of_both_versions_and_of_outer_groups(tmp_path: Path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    write(root / "a/b", memory__max="1000", memory__current="700", memory__stat="anon 5\ninactive_file 50")
    write(root / "a", memory__max="max", memory__current="800")
    write(root, memory__max="5000", memory__current="4900")
    membership.write_text("0::/a/b\n")
    assert [*group_limits(root, membership)] == [350, 100]
    old = {"memory__limit_in_bytes": "600", "memory__usage_in_bytes": "500", "memory__stat": "total_inactive_file 7"}
    write(root / "memory", **old)
    membership.write_text("9:cpu,cpuacct:/x\n4:memory:/not/here\n")
    assert [*group_limits(root, membership)] == [107]
    membership.write_text("")
    assert [*group_limits(root, membership)] == [*group_limits(root, tmp_path / "none")] == []


def test_free_memory_is_no_more_than_there_is():
    import psutil

    assert 0 < free_memory(torch.device("cpu")) <= psutil.virtual_memory().total


def test_a_meter_counts_peak_and_level():
    meter, kept = MemoryMeter(torch.device("cpu")), []

    def work() -> None:
        first = torch.zeros(1000)  # 4000 bytes
        kept.append(first + 1)
        torch.zeros(500)  # gone at once, beside the two
        del first

    for times in (1, 2):
        assert meter.measure(work) == pytest.approx(4000 * times + 6000, abs=200)
        assert meter.level == pytest.approx(4000 * times, abs=200)
    assert meter.measure(kept.clear) == pytest.approx(8000, abs=200)
    assert meter.level == 0


def test_tensors_in_nested_values():
    a, b, c, d = torch.zeros(4, 1)
    assert [id(each) for each in tensors_in([{"x": (a, 3), b: None}, c, "d", {1: [d]}])] == [
        id(each) for each in (b, a, c, d)
    ]
