"""Byte n-grams as rows of one table each, by a hash.

# B rows, T bytes, N sizes of n-grams
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PRIME = 1_000_000_007


def ngram_hashes(ids_BT: Tensor, sizes: Sequence[int], table_size: int, index_BT: Tensor) -> Tensor:
    """Hash of the n ids that end at each byte, for every n in ``sizes``: (B, T, N), from 0 below ``table_size``.

    Σ_j id_j · PRIME^j over the n-gram from its oldest id on, in int64, which wraps; then the non-negative remainder
    (arXiv:2412.09871, section 3.2.1, and its code). ``index_BT`` is the number of each byte in its document: ids from
    before the document count as 0.
    """
    shifted = [
        torch.where(index_BT >= back, F.pad(ids_BT, (back, 0))[:, : ids_BT.shape[1]], 0) for back in range(max(sizes))
    ]
    hashes = []
    for size in sizes:
        total_BT = torch.zeros_like(ids_BT)
        for back in range(size):  # Horner's rule, the newest id first
            total_BT = total_BT * PRIME + shifted[back]
        hashes.append(total_BT % table_size)
    return torch.stack(hashes, dim=-1)
