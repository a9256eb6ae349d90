"""One set of names for parameters, whichever expert layer is in the model.

Expert parallelism swaps a model's expert block for DeepSpeed's, which splits the fused gate-and-up matrix, keeps
only this worker's experts and has names of its own. Checkpoints and exports speak the model's names.

# E experts, F hidden, D model
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GATE, UP, DOWN = "gate", "up", "down"


@dataclass(frozen=True)
class ExpertNames:
    """Maps names inside DeepSpeed's expert layer to the model's and back; ``layout`` as the model gives it."""

    layout: dict[str, Any]

    def canonical(self, name: str) -> tuple[str, str | None]:
        """The model's own name of a parameter or buffer, and which part of an expert it is: gate, up, down, None."""
        router, experts = self.layout["router_pattern"], self.layout["expert_pattern"]
        fused, down = self.layout["expert_w1"], self.layout["expert_w2"]
        parts = {"w1": (fused, GATE), "w3": (fused, UP), "w2": (down, DOWN)}
        prefix, _, leaf = name.rpartition(".")
        if prefix.endswith(f".{experts}") and leaf in parts:
            return f"{prefix}.{parts[leaf][0]}", parts[leaf][1]
        return name.replace(".router.gate.", f".{router}.").replace(".router.", f".{router}."), None

    @staticmethod
    def fuse(gate_EFD: Tensor, up_EFD: Tensor) -> Tensor:
        """(E, F, D) twice to the model's (E, 2F, D)."""
        return torch.cat([gate_EFD, up_EFD], dim=1)

    @staticmethod
    def part(whole: Tensor, part: str | None, rank: int, size: int) -> Tensor:
        """This worker's share of a whole expert tensor: its experts, and of the fused matrix the gate or up half."""
        if part is None:
            return whole
        if part in (GATE, UP):
            half = whole.shape[1] // 2
            whole = whole[:, :half] if part == GATE else whole[:, half:]
        return whole.chunk(size, dim=0)[rank].contiguous()
