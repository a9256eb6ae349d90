"""Which tokens a token may look at.

# B batch, T queries, S keys
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmada.nn.context import Context


def causal_mask(context: Context, num_keys: int, offset: int = 0, window: int | None = None) -> Tensor | None:
    """True where query t may see key s, (B or 1, 1, T, S); None where that is plain causality from token 0 on.

    Key column s is its row's token number ``offset + s``. ``window`` keys are seen, the token itself among them.
    """
    length = context.shape[1]
    banded = window is not None and window < num_keys
    plain = context.documents_BT is None and context.past_B is None and offset == 0 and not banded
    if plain and (length == num_keys or length == 1):
        # Padding behind the real tokens is never seen by them.
        return None
    query_BT = context.index_BT()[:, None, :, None]
    key_S = offset + torch.arange(num_keys, device=context.device)
    seen = key_S <= query_BT
    if window is not None:
        seen = seen & (key_S > query_BT - window)
    if context.documents_BT is not None:
        seen = seen & (context.documents_BT[:, None, :, None] == context.documents_BT[:, None, None, :])
    return seen
