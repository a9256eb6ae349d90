"""Parts of rows that may begin at another column in each row.

# B batch, T columns
"""

from __future__ import annotations

import torch
from torch import Tensor


def columns_from(start: int | Tensor, width: int, states: Tensor, dim: int = 2) -> Tensor:
    """``width`` columns of each row from column ``start`` on, one number or one per row (B,).

    What lies outside a row is 0 where ``start`` is a number, else a copy of the row's nearest column.
    """
    length = states.shape[dim]
    if isinstance(start, int):
        inside = states.narrow(dim, max(start, 0), max(0, min(start + width, length) - max(start, 0)))
        before = min(max(0, -start), width)
        behind = width - before - inside.shape[dim]
        if not before and not behind:
            return inside
        return torch.nn.functional.pad(inside, [0, 0] * (states.dim() - 1 - dim % states.dim()) + [before, behind])
    index_BT = (start[:, None] + torch.arange(width, device=states.device)).clamp(0, length - 1)
    return pick_columns(states, index_BT, dim)


def pick_columns(states: Tensor, index_BX: Tensor, dim: int = 2) -> Tensor:
    """The columns named by ``index_BX``, (B, X), or (1, X) for the same ones in every row."""
    if index_BX.shape[0] == 1:
        return states.index_select(dim, index_BX[0])
    shape = [1] * states.dim()
    shape[0], shape[dim] = index_BX.shape
    expanded = list(states.shape)
    expanded[dim] = index_BX.shape[1]
    return states.gather(dim, index_BX.view(shape).expand(expanded))
