"""Which parameters the optimizer decays, and which learn faster or slower than others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

FACTOR = "learning_rate_factor"  # of a group, on the learning rate of a step


def parameter_groups(
    model: nn.Module, weight_decay: float, factors: Sequence[tuple[str, float]] = ()
) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms, biases) do not, as everywhere since GPT-2.

    Nor does a parameter that carries ``_no_weight_decay``, as the decay rates of state spaces do (Mamba's convention).
    Parameters without gradient are left out. ``factors``: pairs of a regular expression and the factor of those whose
    names it is found in; the first that is found counts, 1 where none is.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.dim() >= 2 and not getattr(parameter, "_no_weight_decay", False)
        factor = next((factor for pattern, factor in factors if re.search(pattern, name)), 1.0)
        kind = "matrices" if decays else "vectors"
        group = groups.setdefault(
            (not decays, factor),
            {
                "name": kind if factor == 1 else f"{kind} at {factor:g}",
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                FACTOR: factor,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
