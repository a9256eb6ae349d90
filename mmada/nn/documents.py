"""Packed rows taken apart, so that every document is a row of its own, and put together again.

# B batch, T tokens, N documents of all rows, L tokens of the longest
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmada.nn.context import Context


@dataclass(frozen=True)
class Documents:
    """``context``: of the documents as rows. ``last_B``: the document that each packed row ends in.

    ``place_BT``: where each token stands among N·L.
    """

    context: Context
    last_B: Tensor
    place_BT: Tensor

    @staticmethod
    def of(context: Context) -> Documents:
        """The documents of a packed forward pass; a new one begins wherever ``documents_BT`` changes."""
        return context.once("documents", lambda: _find(context))

    def split(self, states_BTD: Tensor) -> Tensor:
        """(B, T, D) to (N, L, D), 0 behind each document's end."""
        documents, longest = self.context.shape
        rows = states_BTD.new_zeros(documents * longest, states_BTD.shape[2])
        return rows.index_copy(0, self.place_BT.flatten(), states_BTD.flatten(0, 1)).view(documents, longest, -1)

    def join(self, states_NLD: Tensor) -> Tensor:
        """(N, L, D) to (B, T, D)."""
        return states_NLD.flatten(0, 1)[self.place_BT]


def _find(context: Context) -> Documents:
    (batch, length), documents_BT = context.shape, context.documents_BT
    begins_BT = torch.ones(batch, length, dtype=torch.bool, device=context.device)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    number_BT = begins_BT.flatten().cumsum(0).view(batch, length) - 1
    first_N = begins_BT.flatten().nonzero()[:, 0]
    column_BT = torch.arange(batch * length, device=context.device).view(batch, length) - first_N[number_BT]
    real_BT, last_B = context.valid_BT(), number_BT[:, -1]
    if real_BT is None:
        real_BT = torch.ones_like(begins_BT)
    else:
        last_B = number_BT.gather(1, (context.lengths_B[:, None] - 1).clamp(min=0))[:, 0]
    lengths_N = torch.zeros_like(first_N).index_add(0, number_BT.flatten(), real_BT.flatten().long())
    longest = int(column_BT.max()) + 1
    alone = Context(
        shape=(len(first_N), longest),
        device=context.device,
        position_ids_BT=torch.arange(longest, device=context.device).expand(len(first_N), -1),
        lengths_B=lengths_N,
    )
    return Documents(alone, last_B, number_BT * longest + column_BT)
