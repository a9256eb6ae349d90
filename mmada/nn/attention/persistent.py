"""Keys and values that are learned, and the same for every input (Titans, arXiv:2501.00663, section 3.3).

# B batch, G key/value heads, N persistent rows, S keys, K head_dim
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mmada.config import MMaDAConfig


class PersistentKeyValues(nn.Module):
    """Rows that stand in front of a sequence's own keys and values and that every query sees.

    They have no position: nothing rotates them, no bias falls on them, and they are in no cache.
    """

    def __init__(self, config: MMaDAConfig, num_rows: int) -> None:
        super().__init__()
        shape = (config.num_key_value_heads, num_rows, config.head_dim)
        self.persistent_key = nn.Parameter(torch.zeros(shape))
        self.persistent_value = nn.Parameter(torch.zeros(shape))

    def init_own_weights(self, config: MMaDAConfig) -> None:
        init.normal_(self.persistent_key, mean=0.0, std=config.initializer_range)
        init.normal_(self.persistent_value, mean=0.0, std=config.initializer_range)

    def forward(self, key_BGSK: Tensor, value_BGSK: Tensor, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The keys and values (B, G, N + S, K) with these in front; ``heads``: which of ours, where G are not all."""
        batch = key_BGSK.shape[0]
        key_BGNK = self.persistent_key[heads].to(key_BGSK).expand(batch, -1, -1, -1)
        value_BGNK = self.persistent_value[heads].to(value_BGSK).expand(batch, -1, -1, -1)
        return torch.cat([key_BGNK, key_BGSK], dim=2), torch.cat([value_BGNK, value_BGSK], dim=2)
