"""Which blocks of keys a block of queries sees in block-sparse attention (BigBird, arXiv:2007.14062, made causal).

A query block sees its own and the blocks before it (window), the first ones (global), and some between these two
(random). Rows of global queries that BigBird has need nothing here: under causality the first blocks see each other.

# Q query blocks, N key blocks, M chosen key blocks
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmada.nn.router import mix64


@dataclass(frozen=True)
class BlockPattern:
    """The random blocks are a function of ``layer_idx`` and the query block, so decoding sees what training saw."""

    size: int
    num_window: int
    num_global: int
    num_random: int
    layer_idx: int

    def chosen(self, block_Q: Tensor) -> Tensor:
        """The key blocks that each of the query blocks sees, (..., M), each once; -1 where there are fewer."""
        block_Q1, device = block_Q[..., None], block_Q.device
        window_QM = block_Q1 - torch.arange(self.num_window, device=device)
        global_M = torch.arange(self.num_global, device=device)
        # A global block inside the window counts once, as part of the window.
        global_QM = torch.where(global_M <= block_Q1 - self.num_window, global_M, -1)
        chosen_QM = torch.cat([window_QM.clamp(min=-1), global_QM], dim=-1)
        return torch.cat([chosen_QM, self._random(block_Q1)], dim=-1) if self.num_random else chosen_QM

    def _random(self, block_Q1: Tensor) -> Tensor:
        """One block from each of ``num_random`` equal parts of those that are neither global nor in the window."""
        draw_M = torch.arange(self.num_random, device=block_Q1.device)
        count_Q1 = (block_Q1 - self.num_window + 1 - self.num_global).clamp(min=0)
        first_QM = draw_M * count_Q1 // self.num_random
        size_QM = (draw_M + 1) * count_Q1 // self.num_random - first_QM
        key_QM = mix64(mix64(block_Q1 + (self.layer_idx << 40)) + draw_M)
        drawn_QM = self.num_global + first_QM + key_QM.remainder(size_QM.clamp(min=1))
        return torch.where(size_QM > 0, drawn_QM, -1)

    def table(self, num_blocks: int, device: torch.device) -> Tensor:
        """True where a query block sees a key block, (Q, N), both ``num_blocks``."""
        chosen_QM = self.chosen(torch.arange(num_blocks, device=device))
        table_QN = torch.zeros(num_blocks, num_blocks + 1, dtype=torch.bool, device=device)
        return table_QN.scatter(1, chosen_QM.remainder(num_blocks + 1), True)[:, :num_blocks]
