"""A model's weights as one buffer: packed once, put once, mapped by every process of a node without a copy."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from cluster.errors import ClusterError

ALIGNMENT = 64  # a cache line, and where Ray's object store puts large buffers
_FIRST_CAPACITY = 1 << 20


@dataclass(frozen=True)
class TensorLayout:
    """Where one tensor lies: ``dtype`` is torch's name without ``torch.``, ``offset`` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class PackedWeights:
    """Named tensors in one contiguous uint8 buffer; each begins at a multiple of ALIGNMENT."""

    version: int
    buffer: np.ndarray
    layout: tuple[TensorLayout, ...]
    checksum: int

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        return self.buffer.nbytes

    def verify(self, version: int | None = None) -> None:
        """Raise ClusterError unless version and content are what was packed."""
        if version is not None and version != self.version:
            raise ClusterError(f"weights are of version {self.version}, not of version {version}; publish them again")
        if (found := _checksum(self.version, self.layout, self.buffer)) != self.checksum:
            raise ClusterError(
                f"weights of version {self.version} are damaged: checksum {found:08x}, packed with "
                f"{self.checksum:08x}; something wrote into them, or memory or network is at fault: publish them again"
            )


def pack(tensors: Iterable[tuple[str, Tensor]], version: int = 0) -> PackedWeights:
    """Copy tensors of any device and dtype into one buffer, one at a time as the iterable yields them.

    Beside the buffer itself no tensor is held while the next one is made: the buffer grows as it fills, in place where
    the operating system can do so. Raises ClusterError on a name that comes twice.
    """
    buffer, used = np.zeros(_FIRST_CAPACITY, np.uint8), 0  # gaps are zero, for they count in the checksum
    layout: dict[str, TensorLayout] = {}
    for name, tensor in tensors:
        if name in layout:
            raise ClusterError(f"weights named {name} come twice; give each tensor a name of its own")
        offset = -(-used // ALIGNMENT) * ALIGNMENT
        used = offset + tensor.numel() * tensor.element_size()
        if used > buffer.nbytes:
            # Adds zeros. No view of the buffer is alive here, so that it may move.
            buffer.resize(max(used, buffer.nbytes + buffer.nbytes // 8), refcheck=False)
        entry = TensorLayout(name, _dtype_name(tensor.dtype), tuple(tensor.shape), offset, used - offset)
        _tensor(buffer, entry).copy_(tensor.detach())
        layout[name] = entry
        del tensor
    buffer.resize(used, refcheck=False)
    entries = tuple(layout.values())
    return PackedWeights(version, buffer, entries, _checksum(version, entries, buffer))


def unpack(packed: PackedWeights) -> dict[str, Tensor]:
    """The tensors by name, as views of the buffer, which they keep alive.

    They are for reading: what came through the object store is shared by all processes of the node. torch knows no
    read-only tensor and would warn of every such buffer, so the rule is the caller's to keep; ``verify`` finds who
    broke it.
    """
    buffer = np.asarray(_Writable(packed.buffer))
    return {entry.name: _tensor(buffer, entry) for entry in packed.layout}


def publish(packed: PackedWeights) -> Any:
    """Put into the object store: a reference. The calling process owns it; it is lost when that process ends."""
    return ray.put(packed)


def fetch(ref: Any, timeout_s: float, version: int | None = None) -> PackedWeights | None:
    """What ``publish`` of any process put there, verified; None when lost with that process, or not here in time.

    On the node of the publisher nothing is copied. Raises ClusterError when the content is damaged, or not of
    ``version`` where that is given.
    """
    try:
        packed = ray.get(ref, timeout=timeout_s)
    except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
        return None
    packed.verify(version)
    return packed


class _Writable:
    """An array as numpy's array interface with the read-only mark off; an array made of it keeps it alive."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _tensor(buffer: np.ndarray, entry: TensorLayout) -> Tensor:
    content = torch.from_numpy(buffer[entry.offset : entry.offset + entry.num_bytes])
    return content.view(getattr(torch, entry.dtype)).view(entry.shape)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checksum(version: int, layout: tuple[TensorLayout, ...], buffer: np.ndarray) -> int:
    return zlib.crc32(buffer.data, zlib.crc32(repr((version, layout)).encode()))
