"""Between the caller's columns, where padding may stand anywhere, and the front layout that mixers see.

# B batch, T tokens of this forward pass, S columns so far, H heads
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from mmada.nn.context import take_columns
from mmada.nn.patches.byte_patches import PatchedOutput


def valid_columns(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Which of the last ``length`` columns are real tokens, (B, T); None where all are. Raises ValueError."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; give (batch, tokens), 1 for tokens and 0 "
            "for padding"
        )
    valid_BT = attention_mask[:, -length:].bool()
    return None if bool(valid_BT.all()) else valid_BT


def packed_documents(position_ids_BT: Tensor, valid_BT: Tensor | None, past: int = 0) -> Tensor | None:
    """Number of each token's document where positions start again inside a row, (B, T); None where none do.

    Both in front layout; positions of padding mean nothing. ``past``: tokens that a cache holds of the rows.
    Raises ValueError where a document would begin behind those.
    """
    starts_BT = position_ids_BT[:, 1:] <= position_ids_BT[:, :-1]
    if valid_BT is not None:
        starts_BT = starts_BT & valid_BT[:, 1:]
    if not bool(starts_BT.any()):
        return None
    if past > 0:
        raise ValueError(
            f"position_ids start again inside a row, behind {past} tokens in the cache; packed documents need an "
            "empty cache, or a row each"
        )
    return torch.nn.functional.pad(starts_BT.cumsum(dim=1), (1, 0))


def restore_columns(outputs: MoeModelOutputWithPast, order_BT: Tensor) -> None:
    """Put the tokens of everything in ``outputs`` back where the caller had them, given the order that does it."""
    batch, length = order_BT.shape
    outputs.last_hidden_state = take_columns(outputs.last_hidden_state, order_BT)
    if isinstance(outputs, PatchedOutput):
        return  # all else is over patches, which the caller does not know by columns
    if outputs.router_logits is not None:
        outputs.router_logits = tuple(
            take_columns(z.view(batch, length, -1), order_BT).flatten(0, 1) for z in outputs.router_logits
        )
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(take_columns(states, order_BT) for states in outputs.hidden_states)
    if outputs.attentions is not None:
        outputs.attentions = tuple(take_columns(weights, order_BT, dim=2) for weights in outputs.attentions)


def spread_keys(weights_BHTS: Tensor, valid_BS: Tensor) -> Tensor:
    """Attention weights over a row's tokens, laid out over all of the caller's columns with 0 at padding.

    Without the oldest tokens where a window has let go of them.
    """
    number_BS = valid_BS.cumsum(dim=1) - 1
    num_keys = weights_BHTS.shape[3]
    first = max(0, int(number_BS[:, -1].max()) + 1 - num_keys)
    seen_BS = valid_BS & (number_BS >= first)
    index_BS = (number_BS - first).clamp(0, num_keys - 1)
    return take_columns(weights_BHTS, index_BS, dim=3) * seen_BS[:, None, None]
