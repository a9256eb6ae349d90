"""Policy-gradient algorithms, a small file each, and one table of them."""

from mmada.training.algorithms.base import (
    Advantages,
    AdvantageSettings,
    Algorithm,
    Counts,
    LossParts,
    LossSettings,
    PolicyBatch,
    ScoredBatch,
)
from mmada.training.algorithms.table import ALGORITHMS

__all__ = [
    "ALGORITHMS",
    "AdvantageSettings",
    "Advantages",
    "Algorithm",
    "Counts",
    "LossParts",
    "LossSettings",
    "PolicyBatch",
    "ScoredBatch",
]
