"""Memory for big, short-lived CPU tensors."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor


class BufferPool:
    """Big CPU buffers whose memory is used again once the last tensor on it is gone.

    The C library gives every block above 32 MiB back to the system and gets it page by page the next time: for the
    gradients of expert weights that costs more than the smaller matrix products. What is idle here and what is lent
    out never add up to more than 1.25 times what was once lent out at the same time; what has been idle longest goes
    first. Other devices have such an allocator of their own.
    """

    SMALLEST = 1 << 20  # bytes; below this the C library keeps what it frees
    ALIGNMENT = 64
    SLACK = 1.25

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[np.ndarray] = []  # the longest unused first
        self._returned: deque[np.ndarray] = deque()  # filled by finalizers, which must not wait for a lock
        self._lent = self._most_lent = 0

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor with the dtype and the device of ``like``."""
        num_bytes = math.prod(shape) * like.element_size()
        if num_bytes < self.SMALLEST or like.device.type != "cpu":
            return like.new_empty(shape)
        block = self._take(num_bytes)
        lease = block[:num_bytes]  # the tensor's storage holds this view; when it dies the block comes back
        weakref.finalize(lease, self._returned.append, block).atexit = False
        return torch.frombuffer(lease, dtype=like.dtype).resize_(shape)

    def _take(self, num_bytes: int) -> np.ndarray:
        # Four sizes to each power of two, so that buffers whose size varies from step to step meet their like.
        step = 1 << (num_bytes.bit_length() - 3)
        size = -(-num_bytes // step) * step
        with self._lock:
            while self._returned:
                self._idle.append(self._returned.popleft())
                self._lent -= self._idle[-1].size
            place = next((place for place, block in enumerate(self._idle) if block.size == size), None)
            block = self._new_block(size) if place is None else self._idle.pop(place)
            self._lent += size
            self._most_lent = max(self._most_lent, self._lent)
            while self._idle and self._lent + sum(idle.size for idle in self._idle) > self.SLACK * self._most_lent:
                self._idle.pop(0)
        return block

    def _new_block(self, size: int) -> np.ndarray:
        memory = np.empty(size + self.ALIGNMENT, dtype=np.uint8)  # numpy asks for huge pages, PyTorch does not
        start = -memory.ctypes.data % self.ALIGNMENT
        return memory[start : start + size]


_pool = BufferPool()


def empty(like: Tensor, *shape: int) -> Tensor:
    """``like.new_empty(shape)``, from the pool of this process where that is on the CPU and big."""
    return _pool.empty(like, *shape)
