"""Block-sparse attention: each block of queries meets just the key blocks that its pattern chooses.

# B batch, R rows that differ: B, or 1 where all agree, T queries, S keys, P persistent keys, Q query blocks, C queries
# of a block, M chosen key blocks, X keys of these, H query heads, G key/value heads, K head_dim
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmada.nn.attention.banded import Tile
from mmada.nn.attention.rows import columns_from, pick_columns
from mmada.nn.masks import Visibility


@dataclass(frozen=True)
class Grid:
    """Where blocks of queries are cut: at multiples of the block size, counted from where a document begins.

    ``number_RQ``: the first query's number in its document. ``start_RQ``: the key column of that document's first
    token. ``first_RQ``: the query column of the first query. ``slot_RT``: where each query went, of the Q · C places.
    The last two are None where blocks are just cut one after the other, with ``lead`` (one number, or one per row)
    empty places in front.
    """

    width: int
    number_RQ: Tensor
    start_RQ: Tensor
    lead: int | Tensor = 0
    first_RQ: Tensor | None = None
    slot_RT: Tensor | None = None

    def take(self, states: Tensor, dim: int = 2) -> Tensor:
        """(B, ..., T, ...) to (B, ..., Q, C, ...); a place without a query has anything."""
        num_blocks, length = self.number_RQ.shape[1], states.shape[dim]
        if self.first_RQ is None:
            states = columns_from(-self.lead, num_blocks * self.width, states, dim)
        else:
            column_RQC = self.first_RQ[..., None] + torch.arange(self.width, device=states.device)
            states = pick_columns(states, column_RQC.clamp(max=length - 1).flatten(1), dim)
        return states.unflatten(dim, (num_blocks, self.width))

    def put_back(self, states: Tensor, length: int) -> Tensor:
        """(B, Q · C, ...) to (B, T, ...)."""
        if self.slot_RT is None:
            return columns_from(self.lead, length, states, dim=1)
        return pick_columns(states, self.slot_RT, dim=1)


def make_grid(visibility: Visibility) -> Grid:
    """The grid of one forward pass."""
    size, length, device = visibility.pattern.size, visibility.num_queries, visibility.query_BT.device
    if visibility.documents_BT is not None:
        return _document_grid(visibility.document_starts, size)
    past = visibility.past if visibility.past_B is None else visibility.past_B
    lead = past % size if length > 1 else 0
    width = size if length > 1 else 1  # a single new token stands alone
    num_blocks = -(-((lead if isinstance(lead, int) else int(lead.max())) + length) // width)
    first_R1 = torch.as_tensor(past - lead, device=device).view(-1, 1)
    number_RQ = first_R1 + width * torch.arange(num_blocks, device=device)
    return Grid(width, number_RQ, torch.zeros_like(number_RQ), lead)


def _document_grid(starts_BT: Tensor, size: int) -> Grid:
    batch, length = starts_BT.shape
    column_T = torch.arange(length, device=starts_BT.device)
    number_BT = column_T - starts_BT
    opens_BT = number_BT % size == 0
    block_BT = opens_BT.cumsum(dim=1) - 1
    num_blocks = int(block_BT.max()) + 1
    first_BQ = block_BT.new_zeros(batch, num_blocks + 1)
    first_BQ = first_BQ.scatter(1, torch.where(opens_BT, block_BT, num_blocks), column_T.expand_as(block_BT))[:, :-1]
    return Grid(
        width=size,
        number_RQ=number_BT.gather(1, first_BQ),
        start_RQ=starts_BT.gather(1, first_BQ),
        first_RQ=first_BQ,
        slot_RT=block_BT * size + number_BT % size,
    )


def block_sparse(tile: Tile, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
    """query (B, H, T, K); key, value (B, G, P + S, K) of all tokens so far. Returns (B, T, H, K)."""
    batch, pattern, num_tokens = query.shape[0], visibility.pattern, visibility.num_tokens
    grid = visibility.once("grid", lambda: make_grid(visibility))
    width, num_blocks = grid.width, grid.number_RQ.shape[1]
    number_RQC = grid.number_RQ[..., None] + torch.arange(width, device=query.device)
    chosen_RQM = pattern.chosen(grid.number_RQ // pattern.size)
    key_number_RQX = (chosen_RQM[..., None] * pattern.size + torch.arange(pattern.size, device=query.device)).flatten(2)
    distance_RQCX = number_RQC[..., None] - key_number_RQX[:, :, None]
    column_RQX = grid.start_RQ[..., None] + key_number_RQX
    exists_RQX = (key_number_RQX >= 0) & (column_RQX < num_tokens)
    seen_RQCX = (distance_RQCX >= 0) & exists_RQX[:, :, None]
    # Only places without a query see nothing; so that they stay finite they see everything. What a document's last
    # block reaches of the next one stands behind all its queries.
    seen_RQCX = seen_RQCX | ~seen_RQCX.any(dim=-1, keepdim=True)

    chosen_key, chosen_value = (
        _chosen(states, column_RQX.clamp(0, num_tokens - 1), visibility.num_persistent) for states in (key, value)
    )
    rows = (batch, *seen_RQCX.shape[1:])
    mixed_XCHK = tile(
        grid.take(query).transpose(1, 2).flatten(0, 1),
        chosen_key,
        chosen_value,
        seen_RQCX.expand(rows).flatten(0, 1)[:, None],
        distance_RQCX.expand(rows).flatten(0, 1),
    )
    return grid.put_back(mixed_XCHK.view(batch, num_blocks * width, *mixed_XCHK.shape[2:]), query.shape[2])


def _chosen(states: Tensor, column_RQX: Tensor, num_persistent: int) -> Tensor:
    """The keys of each query block behind the persistent ones, (B · Q, G, P + X, K)."""
    front_BGPK, states = states[:, :, :num_persistent], states[:, :, num_persistent:]
    chosen_BGQXK = pick_columns(states, column_RQX.flatten(1)).unflatten(2, column_RQX.shape[1:])
    if num_persistent:
        front_BGQPK = front_BGPK[:, :, None].expand(-1, -1, column_RQX.shape[1], -1, -1)
        chosen_BGQXK = torch.cat([front_BGQPK, chosen_BGQXK], dim=3)
    return chosen_BGQXK.transpose(1, 2).flatten(0, 1)
