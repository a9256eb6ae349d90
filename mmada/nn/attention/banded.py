"""Sliding-window attention in bands: time and memory grow with T times the window, no (T, T) tensor is made.

Queries stand in bands as wide as the window, and each band meets the keys of its own columns and of the band before,
which is all that it can see. All bands but the first have the same mask, so they go through one call.

# B batch, T queries, S keys, P persistent keys, H query heads, G key/value heads, K head_dim, R bands, W width of one
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmada.nn.attention.rows import columns_from
from mmada.nn.masks import Visibility

SMALLEST_BAND = 32  # narrower ones would be many tiny products

# tile(query, key, value, seen (·, 1, t, s), distance (·, t, s)) -> (·, t, H, K); persistent keys in front are extra.
Tile = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def band_size(window: int) -> int:
    return max(window, SMALLEST_BAND)


def banded(tile: Tile, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
    """query (B, H, T, K) with T above ``band_size``; key, value (B, G, P + S, K). Returns (B, T, H, K)."""
    width, window, length = band_size(visibility.window), visibility.window, query.shape[2]
    front_key, front_value = (states[:, :, : visibility.num_persistent] for states in (key, value))
    history, key, value = _aligned(key, value, visibility, width)
    distance_WS = _distance(width, history + width, history, query.device)
    seen = _in_window(distance_WS, window)[None]
    if visibility.past_B is not None:  # columns in front of a row's first token are nobody's
        first_B11 = (history - visibility.past_B)[:, None, None]
        seen = seen & (torch.arange(history + width, device=query.device) >= first_B11)
    documents_BT = visibility.documents_BT
    if documents_BT is not None:  # then no history
        seen = seen & (documents_BT[:, :width, None] == documents_BT[:, None, :width])
    first_BWHK = tile(
        query[:, :, :width],
        torch.cat([front_key, key[:, :, : history + width]], dim=2),
        torch.cat([front_value, value[:, :, : history + width]], dim=2),
        seen[:, None],
        distance_WS[None],
    )

    num_bands = -(-(length - width) // width)
    distance_WS = _distance(width, 2 * width, width, query.device)
    seen = _in_window(distance_WS, window)[None]
    if documents_BT is not None:
        own_BRW = _bands(documents_BT[:, None, width:, None], num_bands, width)[:, :, 0, :, 0]
        both_BRS = _with_previous(documents_BT[:, None, :, None], num_bands, width)[:, :, 0, :, 0]
        seen = seen & (own_BRW.flatten(0, 1)[:, :, None] == both_BRS.flatten(0, 1)[:, None])
    rest_XWHK = tile(
        _bands(query[:, :, width:], num_bands, width).flatten(0, 1),
        _band_keys(front_key, key[:, :, history:], num_bands, width),
        _band_keys(front_value, value[:, :, history:], num_bands, width),
        seen[:, None],
        distance_WS[None],
    )
    rest_BTHK = rest_XWHK.view(query.shape[0], num_bands * width, *rest_XWHK.shape[2:])
    return torch.cat([first_BWHK, rest_BTHK[:, : length - width]], dim=1)


def _aligned(key: Tensor, value: Tensor, visibility: Visibility, width: int) -> tuple[int, Tensor, Tensor]:
    """How many columns come before a row's first query, and keys and values with just these in front of its own."""
    skipped, length = visibility.num_persistent, visibility.num_queries
    if visibility.past_B is None:
        before = visibility.past - visibility.offset
        history = min(before, width)
        start: int | Tensor = skipped + before - history
    else:
        history = width
        # Never a persistent column for a token's: those before the first are copies and are not seen.
        key, value, start = key[:, :, skipped:], value[:, :, skipped:], visibility.past_B - visibility.offset - history
    key, value = (columns_from(start, history + length, states) for states in (key, value))
    return history, key, value


def _distance(num_queries: int, num_keys: int, before: int, device: torch.device) -> Tensor:
    """Columns from each query back to each key, where ``before`` of the keys come before the first query."""
    return before + torch.arange(num_queries, device=device)[:, None] - torch.arange(num_keys, device=device)


def _in_window(distance: Tensor, window: int) -> Tensor:
    return (distance >= 0) & (distance < window)


def _bands(states_BHTK: Tensor, num_bands: int, width: int) -> Tensor:
    """(B, R, H, W, K), filled up with zeros at the end."""
    surplus = num_bands * width - states_BHTK.shape[2]
    return pad(states_BHTK, (0, 0, 0, surplus)).unflatten(2, (num_bands, width)).transpose(1, 2)


def _with_previous(states_BGSK: Tensor, num_bands: int, width: int) -> Tensor:
    """Every band but the first behind the one before it, (B, R, G, 2 W, K)."""
    bands = _bands(states_BGSK, num_bands + 1, width)
    return torch.cat([bands[:, :-1], bands[:, 1:]], dim=3)


def _band_keys(front_BGPK: Tensor, states_BGTK: Tensor, num_bands: int, width: int) -> Tensor:
    """The keys that each band but the first meets, (B · R, G, P + 2 W, K)."""
    front_BRGPK = front_BGPK[:, None].expand(-1, num_bands, -1, -1, -1)
    return torch.cat([front_BRGPK, _with_previous(states_BGTK, num_bands, width)], dim=3).flatten(0, 1)
