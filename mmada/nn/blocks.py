"""Going through a sequence in blocks of tokens, so that what is computed on the way stays near the processor."""

from __future__ import annotations

from torch import Tensor

# Of the largest intermediate of a block. A processor: a few of them fit a core's cache; others: few, large launches.
BLOCK_BYTES = {"cpu": 1 << 19}
OTHER_BLOCK_BYTES = 1 << 28


def blocks(count: int, numbers: int, like: Tensor) -> list[slice]:
    """``count`` tokens or chunks in blocks; intermediates of one have ``numbers`` numbers of the dtype of ``like``."""
    most = BLOCK_BYTES.get(like.device.type, OTHER_BLOCK_BYTES)
    size = max(1, most // (numbers * like.element_size()))
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
