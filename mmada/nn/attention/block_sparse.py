"""Block-sparse attention: each block of queries meets just the key blocks that its pattern chooses.

# B batch, R rows that differ: B, or 1 where all agree, T queries, S keys, P persistent keys, Q query blocks, C queries
# of a block, M chosen key blocks, X keys of these, H query heads, G key/value heads, K head_dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmada.nn.attention.banded import Tile
from mmada.nn.attention.rows import columns_from, pick_columns
from mmada.nn.masks import Visibility


def block_sparse(tile: Tile, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
    """query (B, H, T, K); key, value (B, G, P + S, K) of all tokens so far. Returns (B, T, H, K)."""
    length, size = query.shape[2], visibility.pattern.size
    past = visibility.past if visibility.past_B is None else visibility.past_B
    # Blocks begin at multiples of their size; a single new token stands alone.
    lead = past % size if length > 1 else 0
    width = size if length > 1 else 1
    longest_lead = lead if isinstance(lead, int) else int(lead.max())
    num_blocks = -(-(longest_lead + length) // width)

    first_R = torch.as_tensor(past - lead, device=query.device).view(-1)
    number_RQC = (first_R[:, None] + torch.arange(num_blocks * width, device=query.device)).unflatten(1, (-1, width))
    chosen_RQM = visibility.pattern.chosen(number_RQC[..., 0] // size)
    key_number_RQX = (chosen_RQM[..., None] * size + torch.arange(size, device=query.device)).flatten(2)
    distance_RQCX = number_RQC[..., None] - key_number_RQX[:, :, None]
    within_RQX = (key_number_RQX >= 0) & (key_number_RQX < visibility.num_tokens)
    seen_RQCX = (distance_RQCX >= 0) & within_RQX[:, :, None]
    column_RX = key_number_RQX.clamp(0, visibility.num_tokens - 1).flatten(1)
    if visibility.documents_BT is not None:
        own_BQC = columns_from(-lead, num_blocks * width, visibility.documents_BT, dim=1).unflatten(1, (-1, width))
        chosen_BQX = pick_columns(visibility.documents_BT, column_RX, dim=1).unflatten(1, (num_blocks, -1))
        seen_RQCX = seen_RQCX & (own_BQC[..., None] == chosen_BQX[:, :, None])
    seen_RQCX = seen_RQCX | ~seen_RQCX.any(dim=-1, keepdim=True)  # only queries that do not exist see nothing

    batch = query.shape[0]
    grid = columns_from(-lead, num_blocks * width, query)
    query_XHCK = grid.unflatten(2, (num_blocks, width)).transpose(1, 2).flatten(0, 1)
    chosen_key, chosen_value = (
        _chosen(states, column_RX, num_blocks, visibility.num_persistent) for states in (key, value)
    )
    rows = (batch, *seen_RQCX.shape[1:])
    seen_X1CX = seen_RQCX.expand(rows).flatten(0, 1)[:, None]
    mixed_XCHK = tile(query_XHCK, chosen_key, chosen_value, seen_X1CX, distance_RQCX.expand(rows).flatten(0, 1))
    return columns_from(lead, length, mixed_XCHK.view(batch, num_blocks * width, *mixed_XCHK.shape[2:]), dim=1)


def _chosen(states: Tensor, column_RX: Tensor, num_blocks: int, num_persistent: int) -> Tensor:
    """The keys of each query block behind the persistent ones, (B · Q, G, P + X, K)."""
    front_BGPK, states = states[:, :, :num_persistent], states[:, :, num_persistent:]
    chosen_BGQXK = pick_columns(states, column_RX).unflatten(2, (num_blocks, -1))
    if num_persistent:
        front_BGQPK = front_BGPK[:, :, None].expand(-1, -1, num_blocks, -1, -1)
        chosen_BGQXK = torch.cat([front_BGQPK, chosen_BGQXK], dim=3)
    return chosen_BGQXK.transpose(1, 2).flatten(0, 1)
