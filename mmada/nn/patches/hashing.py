"""Byte n-grams as rows of one table each, by a hash.

# B rows, T bytes, N sizes of n-grams (or ids before the first byte)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PRIME = 1_000_000_007


def ngram_hashes(
    ids_BT: Tensor, sizes: Sequence[int], table_size: int, index_BT: Tensor, before_BN: Tensor | None = None
) -> Tensor:
    """Hash of the n ids that end at each byte, for every n in ``sizes``: (B, T, N), from 0 below ``table_size``.

    Σ_j id_j · PRIME^j over the n-gram from its oldest id on, in int64, which wraps; then the non-negative remainder
    (arXiv:2412.09871, section 3.2.1, and its code). ``index_BT`` is the number of each byte in its document: ids from
    before the document count as 0. ``before_BN``: at least max(sizes) - 1 ids before the first column, where there
    are any; what stands before a row's first id there means nothing.
    """
    furthest, length = max(sizes) - 1, ids_BT.shape[1]
    if before_BN is None:
        padded = F.pad(ids_BT, (furthest, 0))
    else:
        padded = torch.cat([before_BN[:, before_BN.shape[1] - furthest :], ids_BT], dim=1)
    shifted = [
        torch.where(index_BT >= back, padded[:, furthest - back : furthest - back + length], 0)
        for back in range(furthest + 1)
    ]
    hashes = []
    for size in sizes:
        total_BT = torch.zeros_like(ids_BT)
        for back in range(size):  # Horner's rule, the newest id first
            total_BT = total_BT * PRIME + shifted[back]
        hashes.append(total_BT % table_size)
    return torch.stack(hashes, dim=-1)
