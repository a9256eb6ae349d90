"""How a query's and a key's product becomes a score, and scores become weights.

# H query heads, N distances
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """normalizer(cap(q kᵀ · ``scaling``) + bias).

    ``softcap``: c of c·tanh(x/c). ``bias_HN``: what is added at each distance; the last one holds beyond. ``dropout``:
    of the weights. ``normalizer``: ``"softmax"`` or ``"sparsemax"``.
    """

    scaling: float
    softcap: float | None = None
    bias_HN: Tensor | None = None
    dropout: float = 0.0
    normalizer: str = "softmax"
