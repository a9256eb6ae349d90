"""What a worker's device has left, and what a piece of work takes of it.

On a GPU the CUDA allocator says both. On a CPU free memory is the kernel's word within the limits of control groups,
and what is taken is what tensors take, counted by torch's profiler: what libraries allocate by themselves is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken: of a GPU by this process, of a CPU's memory by all processes together."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - _allocated(device)
    import psutil

    return min([psutil.virtual_memory().available, *group_limits()])


def group_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes left within each limit that control groups set on this process, of version 1 and 2, its own and outer ones.

    Pages of files that the kernel gives up when memory runs short count as left.
    """
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            mount, names, reclaimable = root, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            mount = root / "memory"
            names, reclaimable = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
        else:
            continue
        inner = mount / path.strip("/")  # in a container it may not be there: the limit is then the mount's own
        for group in [inner, *inner.parents]:
            if (group / names[0]).exists():
                limit, used = ((group / name).read_text().strip() for name in names)
                if limit != "max":
                    yield int(limit) - int(used) + _statistic(group / "memory.stat", reclaimable)
            if group == mount:
                break


def _statistic(file: Path, name: str) -> int:
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


class MemoryMeter:
    """Counts what work takes on a device, beyond what was there when the meter was made.

    On a CPU only what happens inside ``measure`` is seen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.level = 0  # bytes held now
        self._first = _allocated(device) if device.type == "cuda" else 0

    def measure(self, work: Callable[[], Any]) -> int:
        """The most bytes that were held at any time while ``work`` ran; raises whatever it raises."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            work()
            torch.cuda.synchronize(self.device)
            self.level = _allocated(self.device) - self._first
            return torch.cuda.max_memory_allocated(self.device) - self._first
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
            work()
        # The raw events are in no public form that keeps their order; of two at one time the one recorded first.
        events: Any = recorded.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), n, e.nbytes()) for n, e in enumerate(events) if e.name() == "[memory]")
        peak = self.level
        for _, _, change in changes:
            self.level += change
            peak = max(peak, self.level)
        return peak


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dictionaries, keys of these too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device)
