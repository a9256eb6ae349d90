"""Learning rates as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, peak: float, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Learning rate of step ``step`` (0 is the first): linear to ``peak``, then a cosine to ``peak * min_ratio``.

    The first step already moves (peak / warmup_steps); the last step, ``steps - 1``, has the floor exactly.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
